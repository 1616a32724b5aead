"""What a comparison of another engine with the reference comes to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moesaic.errors import VerificationError
from moesaic.evaluate.differences import Differences

EXACT_MEDIAN, EXACT_KL = 1e-3, 1e-4
"""In fp32: bounds of the median |log-probability difference| and of the mean KL divergence, in nats."""


@dataclass(frozen=True)
class EngineParity:
    """An engine against the reference on the same tokens.

    Attributes:
        engine: Its name and version.
        candidates: Tokens whose log-probabilities were compared at each position: the engine's likeliest ones, or the
            whole vocabulary.
        tokens: Positions compared.
        max_delta: Largest |log-probability difference|. Where two experts are nearly equal, rounding decides, and a
            token that takes the other one differs visibly.
        median: Median over positions of each one's largest difference.
        top1: Share of positions whose likeliest next token is the same.
        mean_kl: Mean KL divergence of the engine's distribution from the reference's over the candidates, nats.
    """

    engine: str
    candidates: int
    tokens: int
    max_delta: float
    median: float
    top1: float
    mean_kl: float

    @classmethod
    def of(cls, differences: Differences, *, engine: str, candidates: int) -> EngineParity:
        """The figures of all positions."""
        return cls(engine, candidates, **differences.figures().to_dict())

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)

    def require_exact(self, name: str, hint: str = "report it") -> None:
        """Raise VerificationError when fp32 weights do not compute the reference's function."""
        if not (self.median <= EXACT_MEDIAN and self.mean_kl <= EXACT_KL):
            raise VerificationError(
                f"{name} in {self.engine} differs: log-probabilities by {self.median:.1e} (median), "
                f"mean KL {self.mean_kl:.1e}",
                hint,
            )
