"""Holding the expected widths at the budget exactly, in place of pulling them there by R_P [OURS].

R_P pushes all masks alike with a force that does not fade near the target and flips its sign beyond it; in some
hundreds of steps that noise drowns what distillation says about single neurons. Here a common shift of all logits puts
the expected cost at the budget before each step, and the gradient loses its component along the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tangential(logits: Sequence[Tensor], weights: Sequence[float], shift: float) -> list[Tensor]:
    """The logits themselves; in the backward pass their joint gradient is projected.

    The part along the gradient of sum_i weight_i P(on_i) is taken out, so that to first order a step does not change
    the expected cost.

    Args:
        logits: Mask logits, any shapes.
        weights: Cost of each of their entries.
        shift: What is added to them before sampling.
    """
    return list(_Tangential.apply(tuple(weights), shift, *logits))  # type: ignore[arg-type]


class _Tangential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: tuple[float, ...], shift: float, *logits: Tensor) -> tuple[Tensor, ...]:
        ctx.weights, ctx.shift = weights, shift
        ctx.save_for_backward(*logits)
        return tuple(logit.view_as(logit) for logit in logits)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        totals = [logit + ctx.shift for logit in ctx.saved_tensors]
        # d/dz of 1 - exp(-exp(z))
        slopes = [w * torch.exp(z - torch.exp(z)) for w, z in zip(ctx.weights, totals, strict=True)]
        along = sum(float((g * s).sum()) for g, s in zip(outer, slopes, strict=True))
        length = sum(float(s.square().sum()) for s in slopes)
        factor = along / length if length > 0 else 0.0
        return None, None, *(g - factor * s for g, s in zip(outer, slopes, strict=True))
