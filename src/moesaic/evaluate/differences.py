"""Two engines on the same tokens: the figures that a comparison keeps of every token, and what they come to.

Axes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ROWS = 256  # tokens per softmax in double precision: bounds the copy


@dataclass(frozen=True)
class Figures:
    """What the differences of some tokens come to.

    Attributes:
        tokens: Tokens compared.
        max_delta: Largest |difference| of any of their logits, or log-probabilities.
        median: The same of the token in the middle.
        top1: Share of tokens whose likeliest next token is the same.
        mean_kl: Mean KL divergence from the reference's distribution, nats.
    """

    tokens: int
    max_delta: float
    median: float
    top1: float
    mean_kl: float

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


class Differences(NamedTuple):
    """Per token: its largest |difference|, whether the likeliest next token is the same, KL divergence in nats."""

    delta_T: Tensor
    same_T: Tensor
    kl_T: Tensor

    def figures(self, keep_T: Tensor | None = None) -> Figures:
        """Of all tokens, or of those in the mask ``keep_T``, of which there must be some. NaN counts as infinite."""
        delta_T, same_T, kl_T = self if keep_T is None else (part[keep_T.flatten()] for part in self)
        delta_T, mean_kl = delta_T.nan_to_num(nan=float("inf")), kl_T.double().mean().nan_to_num(nan=float("inf"))
        return Figures(
            len(delta_T),
            delta_T.max().item(),
            delta_T.median().item(),
            same_T.double().mean().item(),
            mean_kl.item(),
        )


def logit_differences(expected_TV: Tensor, actual_TV: Tensor) -> Differences:
    """Of logits over the whole vocabulary."""
    divergence = []
    for expected, actual in zip(expected_TV.split(_ROWS), actual_TV.split(_ROWS), strict=True):
        log_p, log_q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
        divergence.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return Differences(
        (actual_TV - expected_TV).abs().amax(-1),
        actual_TV.argmax(-1) == expected_TV.argmax(-1),
        torch.cat(divergence),
    )


def join(parts: Sequence[Differences]) -> Differences:
    """Those of several windows as one."""
    return Differences(*(torch.cat(part) for part in zip(*parts, strict=True)))


def before_any(marked_NW: Tensor) -> Tensor:
    """Mask of the tokens of each window that come before its first marked one: what attention has not spread to."""
    return marked_NW.long().cumsum(-1) == 0
