"""What a method decides about one attention module (ToMoE): which rotary pairs queries and keys keep, and which value
coordinates each token uses.

Axes: D model width, h head width, P kept pairs, R width of the predictor.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import InputError

VALUE_TENSORS = ("encoder", "norm_weight", "norm_bias", "decoder", "embedding")
"""Fields of :class:`AttentionPlan` that make up the predictor of the value mask: all of them or none."""


@dataclass(frozen=True)
class AttentionPlan:
    """One attention module's pruning (ToMoE section 2). Every head and every key-value head is treated alike.

    Queries and keys lose rotary pairs for good: pair j is the coordinates j and j + h/2 of a head. The softmax scale
    stays that of the full head.

    Values, and each head's output before the output projection, are masked per token by one mask of h entries that is
    predicted from the attention's input x::

        v = decoder gelu(LayerNorm(embedding + encoder x));  on where v > threshold

    If more than ``cap`` are on, the ``cap`` largest stay (of equal ones the lower coordinate); if none, the largest.

    Attributes:
        head_dim: Head width h of the dense model.
        pairs: Kept pairs, sorted, int64 [P] in [0, h/2); None keeps all.
        encoder: [R, D]. None, like the four that follow, where values stay untouched.
        norm_weight: [R].
        norm_bias: [R].
        decoder: [h, R].
        embedding: Mean expert embedding, [R].
        threshold: On is what lies above.
        cap: K, the most coordinates that a token may use; None for no bound.

    Raises:
        InputError: indices or shapes that make no sense.
    """

    head_dim: int
    pairs: Tensor | None = None
    encoder: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    decoder: Tensor | None = None
    embedding: Tensor | None = None
    threshold: float = 0.0
    cap: int | None = None

    def __post_init__(self) -> None:
        half = self.head_dim // 2
        if self.pairs is not None:
            pairs = self.pairs.tolist()
            if not pairs or pairs != sorted(set(pairs)) or pairs[0] < 0 or pairs[-1] >= half:
                raise InputError(
                    f"kept rotary pairs must be at least one, ascending, in 0..{half - 1}", "rebuild the blueprint"
                )
        missing = [name for name in VALUE_TENSORS if getattr(self, name) is None]
        if missing and len(missing) < len(VALUE_TENSORS):
            raise InputError(f"the predictor of the value mask lacks {', '.join(missing)}", "give all five or none")
        if self.encoder is not None and self.decoder is not None:
            rank = self.encoder.shape[0]
            wanted: dict[str, tuple[int, ...]] = {"norm_weight": (rank,), "norm_bias": (rank,), "embedding": (rank,)}
            wanted["decoder"] = (self.head_dim, rank)
            for name, shape in wanted.items():
                if tuple(getattr(self, name).shape) != shape:
                    raise InputError(f"{name} of the value mask is not of shape {list(shape)}", "rebuild the blueprint")
        if self.cap is not None and not 1 <= self.cap <= self.head_dim:
            raise InputError(f"cap {self.cap} of {self.head_dim} value coordinates", "choose 1 <= cap <= head width")

    @property
    def masks_values(self) -> bool:
        """Whether there is a value mask."""
        return self.encoder is not None

    @property
    def rank(self) -> int:
        """Width R of the predictor; 0 without one."""
        return 0 if self.encoder is None else self.encoder.shape[0]

    @property
    def kept(self) -> Tensor:
        """Kept coordinates of a query or key head, int64 [2P]: the kept pairs' first halves, then their second."""
        half = self.head_dim // 2
        pairs = torch.arange(half) if self.pairs is None else self.pairs.long().cpu()
        return torch.cat([pairs, pairs + half])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name; ``pairs`` as int64."""
        found = {name: value for name in VALUE_TENSORS if (value := getattr(self, name)) is not None}
        if self.pairs is not None:
            found["pairs"] = self.pairs.long()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def spec(self) -> dict[str, Any]:
        """What the runtime must know to build this module, as it stands in ``config.json``: shapes and switches."""
        return {
            "head_dim": self.head_dim,
            "pairs": None if self.pairs is None else len(self.pairs),
            "rank": self.rank,
            "threshold": self.threshold,
            "cap": self.cap,
        }

    def diff(self, other: AttentionPlan) -> list[str]:
        """Human-readable differences."""
        a, b = self.spec(), other.spec()
        changed = [f"{key} {value!r} -> {b[key]!r}" for key, value in a.items() if value != b[key]]
        ours, theirs = self.tensors(), other.tensors()
        common = [field.name for field in fields(self) if field.name in ours.keys() & theirs.keys()]
        return changed + [f"{name} differs" for name in common if not torch.equal(ours[name], theirs[name])]
