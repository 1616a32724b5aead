"""What a comparison of another engine with the reference comes to.

Where two experts score equal to within rounding, engines may choose different ones, and neither is wrong; but all later
tokens of that window attend to the one that differs. So equality is judged over several short windows, each computed
with an empty KV cache, and one window in four is excused: a near tie disturbs the window that it is in, wrong weights
disturb (nearly) all. [OURS]
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from moesaic.errors import VerificationError
from moesaic.evaluate.differences import Differences

WINDOWS, WINDOW = 8, 32
"""Windows, and tokens in each, that are enough to judge whether fp32 weights compute the same function."""
EXCUSED = 4
"""One window in this many may differ; none of fewer windows. What shows at one token in 50, independent of the others,
refuses 8 windows of 32 with probability 0.82, at one in 30 with 0.98; near ties at one token in 1000 do with 0.002."""
EXACT_MEDIAN, EXACT_KL = 1e-3, 1e-4
"""In fp32: bounds of a window's median |log-probability difference| and of its mean KL divergence, in nats."""


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
        windows: Windows of equal length that these positions are, each computed without the others.
        window_median: Largest of the windows' own medians after the excused ones (``windows // EXCUSED``) are left out;
            infinite when a value at any position is not finite, which no near tie makes it.
        window_kl: The same of the windows' own mean KL divergences.
        bound: Largest ``median`` that the rounding of the weights explains; None where none are rounded.
    """

    engine: str
    candidates: int
    tokens: int
    max_delta: float
    median: float
    top1: float
    mean_kl: float
    windows: int
    window_median: float
    window_kl: float
    bound: float | None = None

    @classmethod
    def of(cls, differences: Differences, *, engine: str, candidates: int, windows: int) -> EngineParity:
        """The figures of all positions: those of the first window, then of the next, ``windows`` in all."""
        split = (part.view(windows, -1) for part in differences)
        each = [Differences(*window).figures() for window in zip(*split, strict=True)]
        median, kl = math.inf, math.inf
        if bool(differences.delta_T.isfinite().all() and differences.kl_T.isfinite().all()):
            median = sorted(window.median for window in each)[-1 - windows // EXCUSED]
            kl = sorted(window.mean_kl for window in each)[-1 - windows // EXCUSED]
        figures = differences.figures().to_dict()
        return cls(engine, candidates, **figures, windows=windows, window_median=median, window_kl=kl)

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)

    def require_exact(self, name: str, hint: str = "report it") -> None:
        """Raise VerificationError when fp32 weights do not compute the reference's function.

        Judged by the windows: see ``EXCUSED``, ``EXACT_MEDIAN`` and ``EXACT_KL``.
        """
        if not (self.window_median <= EXACT_MEDIAN and self.window_kl <= EXACT_KL):
            excused = self.windows // EXCUSED
            raise VerificationError(
                f"{name} in {self.engine} differs in more than {excused} of {self.windows} windows: log-probabilities "
                f"by {self.window_median:.1e} (median), mean KL {self.window_kl:.1e}",
                hint,
            )
