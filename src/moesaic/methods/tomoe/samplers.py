"""Straight-through samplers: hard values forward, gradients of the relaxed ones backward.

Noise is an argument, so that the caller decides what shares it; ``None`` switches it off.

Axes: N experts, K active experts; "..." any shape.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MEDIAN = math.log(math.log(2.0))
"""logit + bias at which a mask is on with probability 1/2: one Gumbel, not a difference of two, so not 0."""

_TINY = 1e-20


def gumbel(shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel(0, 1) noise in float32: -ln(-ln u). Drawn on the CPU, so that every device gets the same."""
    uniform = torch.rand(shape, generator=generator)
    return (-(-(uniform + _TINY).log()).clamp(min=_TINY).log()).to(device)


def on_probability(logits: Tensor, bias: float | Tensor) -> Tensor:
    """P(mask on) = 1 - exp(-exp(logit + bias)): what :func:`sample_mask` draws from."""
    return -torch.expm1(-torch.exp(logits + bias))


def sample_mask(logits: Tensor, noise: Tensor | None, bias: float | Tensor, temperature: float) -> Tensor:
    """Straight-through Gumbel-sigmoid, {0., 1.} forward; the gradient is y (1 - y) / temperature.

    y = sigmoid((logit + noise + bias) / temperature); on where y > 1/2, so the temperature scales the gradient only.
    """
    total = logits + bias if noise is None else logits + noise + bias
    soft = torch.sigmoid(total / temperature)
    return _straight_through((total > 0).to(soft.dtype), soft)


def sample_route(
    logits_TN: Tensor, noise_TN: Tensor | None, temperature: float, top_k: int = 1
) -> tuple[Tensor, Tensor]:
    """Straight-through Gumbel-softmax: the K experts of largest logit + noise.

    Returns:
        Hard choice [..., N] of K ones with the gradient of K softmax((logits + noise) / temperature), and that softmax
        [..., N]. With K = 1 the choice is an exact draw from softmax(logits). Ties go to the lower index.
    """
    total_TN = logits_TN if noise_TN is None else logits_TN + noise_TN
    soft_TN = (total_TN / temperature).softmax(-1)
    return _straight_through(top_k_of(total_TN, top_k), top_k * soft_TN), soft_TN


def capped_mask(logits: Tensor, threshold: float, cap: int) -> Tensor:
    """Where logits [..., H] lie above the threshold: at least one and at most ``cap``, the largest; ties by index.

    float [..., H], ones and zeros.
    """
    count = (logits > threshold).sum(-1, keepdim=True).clamp(1, cap)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    kept = (torch.arange(logits.shape[-1], device=logits.device) < count).to(logits.dtype)
    return torch.zeros_like(logits).scatter_(-1, order, kept)


def top_k_of(scores_TN: Tensor, top_k: int) -> Tensor:
    """Ones at the K largest scores of each row, else zeros."""
    chosen_TK = scores_TN.argmax(-1, keepdim=True) if top_k == 1 else scores_TN.topk(top_k, dim=-1).indices
    return torch.zeros_like(scores_TN).scatter_(-1, chosen_TK, 1.0)


class _StraightThrough(torch.autograd.Function):
    """``hard`` itself forward (hard + soft - soft would round), the gradient to ``soft`` backward."""

    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, Tensor]:
        return None, outer[0]


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    return _StraightThrough.apply(hard, soft)  # type: ignore[return-value]
