"""Losses over a vocabulary, computed in fp32 a few positions at a time, with the gradient made on the way.

Neither the probabilities nor the fp32 logits of all positions are ever in memory together; what is kept for the
backward pass is one tensor of the size and dtype of the student's logits.

Axes: P positions, V vocabulary, B sequences, W tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 16
"""Positions at a time: so few that what is made on the way stays in the cache (50,000 words: 3 MB a tensor)."""

Chunk = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, chunk: int = CHUNK
) -> Tensor:
    """KL(teacher || student) in nats, mean over positions; gradients flow to the student alone.

    Args:
        student_logits: [..., V].
        teacher_logits: The same shape.
        mask: [...], true where a position counts; all count when None. Where none counts the loss is 0.
        chunk: Positions at a time.
    """
    teacher_PV = teacher_logits.detach().flatten(0, -2)

    def value_and_gradient(student_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        student_CV = student_CV.log_softmax(-1)
        teacher_CV = teacher_PV[rows].float().log_softmax(-1)
        p_CV = teacher_CV.exp()
        # xlogy-like: where the teacher's probability is 0 the term is 0, also when a logit is -inf.
        terms_CV = torch.where(p_CV > 0, p_CV * (teacher_CV - student_CV), 0.0)
        return terms_CV.sum(-1), student_CV.exp_().sub_(p_CV)

    return _chunked(student_logits, mask, chunk, value_and_gradient)


def cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor | None = None, chunk: int = CHUNK) -> Tensor:
    """Mean of -log p(target) in nats. ``logits`` [..., V], ``targets`` [...] int64, ``mask`` as above."""
    targets_P = targets.flatten()

    def value_and_gradient(student_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        student_CV = student_CV.log_softmax(-1)
        own_C1 = targets_P[rows, None]
        value_C = -student_CV.gather(1, own_C1)[:, 0]
        gradient_CV = student_CV.exp_()
        return value_C, gradient_CV.scatter_add_(1, own_C1, gradient_CV.new_full((1, 1), -1.0).expand_as(own_C1))

    return _chunked(logits, mask, chunk, value_and_gradient)


def next_token_loss(logits_BWV: Tensor, ids_BW: Tensor, chunk: int = CHUNK) -> Tensor:
    """Cross-entropy of each token but the first, given those before it."""
    return cross_entropy(logits_BWV[:, :-1], ids_BW[:, 1:], chunk=chunk)


def _chunked(logits: Tensor, mask: Tensor | None, chunk: int, value_and_gradient: Chunk) -> Tensor:
    keep_P = None if mask is None else mask.flatten()
    loss: Tensor = _ChunkedLoss.apply(logits.flatten(0, -2), keep_P, chunk, value_and_gradient)  # type: ignore[assignment]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Mean of a loss per position; the gradient of each chunk is made while its probabilities are at hand."""

    @staticmethod
    def forward(ctx: Any, logits_PV: Tensor, keep_P: Tensor | None, chunk: int, value_and_gradient: Chunk) -> Tensor:
        count = len(logits_PV) if keep_P is None else int(keep_P.sum())
        gradient_PV = torch.empty_like(logits_PV) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=logits_PV.device)
        for start in range(0, len(logits_PV), chunk):
            rows = slice(start, start + chunk)
            value_C, gradient_CV = value_and_gradient(logits_PV[rows].float(), rows)
            if keep_P is not None:  # not by multiplication: an ignored position may hold anything, NaN included
                value_C = value_C.masked_fill(~keep_P[rows].bool(), 0.0)
                gradient_CV = gradient_CV.masked_fill_(~keep_P[rows].bool()[:, None], 0.0)
            total += value_C.sum()
            if gradient_PV is not None:
                gradient_PV[rows] = gradient_CV.div_(max(count, 1))
        ctx.save_for_backward(gradient_PV)
        return total / max(count, 1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient_PV,) = ctx.saved_tensors
        return None if gradient_PV is None else gradient_PV * outer[0].to(gradient_PV.dtype), None, None, None
