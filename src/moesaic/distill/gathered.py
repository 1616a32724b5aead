"""Products with few rows of a large matrix per token, without copying those rows, forwards and backwards.

For a set of rows per token, ``dots`` gives s_tk = <W[i_tk], x_t> and ``combine`` gives y_t = sum_k s_tk W[i_tk]. Each
is the other's derivative by its tokens; the derivative by W is a combination of tokens per row. Cost: T K D, and N D
for the gradient's memory.

Axes: T tokens, K chosen rows per token, N rows, D columns.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Incidence:
    """Which rows each token uses. ``index_TK`` must ascend along K (rows of a sparse matrix in canonical order)."""

    def __init__(self, index_TK: Tensor, rows: int) -> None:
        self.index_TK = index_TK
        self.rows = rows
        self._by_row: tuple[Tensor, Tensor, Tensor] | None = None

    def dots(self, weight_ND: Tensor, x_TD: Tensor) -> Tensor:
        """s_TK without gradient: a product sampled where the sparse matrix of incidences has entries."""
        tokens, k = self.index_TK.shape
        with warnings.catch_warnings():  # torch calls its CSR tensors beta, once per process
            warnings.simplefilter("ignore", UserWarning)
            pattern = torch.sparse_csr_tensor(
                torch.arange(0, tokens * k + 1, k),
                self.index_TK.flatten(),
                x_TD.new_zeros(tokens * k),
                size=(tokens, self.rows),
                check_invariants=False,
            )
        sampled = torch.sparse.sampled_addmm(pattern, x_TD.contiguous(), weight_ND.t(), beta=0.0)
        return sampled.values().view(tokens, k)

    def combine(self, scale_TK: Tensor, weight_ND: Tensor) -> Tensor:
        """y_TD without gradient."""
        return F.embedding_bag(self.index_TK, weight_ND, per_sample_weights=scale_TK.contiguous(), mode="sum")

    def spread(self, scale_TK: Tensor, x_TD: Tensor) -> Tensor:
        """For each row the combination of the tokens that use it, [N, D]; zero for rows that none uses."""
        order, tokens, offsets_N = self._sorted()
        scale = scale_TK.flatten()[order]
        return F.embedding_bag(tokens, x_TD.contiguous(), offsets_N, per_sample_weights=scale, mode="sum")

    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._by_row is None:
            flat = self.index_TK.flatten()
            order = flat.argsort(stable=True)
            counts_N = torch.bincount(flat, minlength=self.rows)
            self._by_row = order, order // self.index_TK.shape[1], counts_N.cumsum(0) - counts_N
        return self._by_row


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, incidence: Incidence, weight_ND: Tensor, x_TD: Tensor) -> Tensor:
        ctx.incidence = incidence
        ctx.save_for_backward(weight_ND, x_TD)
        return incidence.dots(weight_ND, x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        weight_ND, x_TD = ctx.saved_tensors
        _, for_weight, for_x = ctx.needs_input_grad
        return (
            None,
            ctx.incidence.spread(grads[0], x_TD) if for_weight else None,
            ctx.incidence.combine(grads[0], weight_ND) if for_x else None,
        )


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, incidence: Incidence, scale_TK: Tensor, weight_ND: Tensor) -> Tensor:
        ctx.incidence = incidence
        ctx.save_for_backward(scale_TK, weight_ND)
        return incidence.combine(scale_TK, weight_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        scale_TK, weight_ND = ctx.saved_tensors
        _, for_scale, for_weight = ctx.needs_input_grad
        return (
            None,
            ctx.incidence.dots(weight_ND, grads[0]) if for_scale else None,
            ctx.incidence.spread(scale_TK, grads[0]) if for_weight else None,
        )


def dots(incidence: Incidence, weight_ND: Tensor, x_TD: Tensor) -> Tensor:
    """s_tk = <W[i_tk], x_t>, [T, K]."""
    return _Dots.apply(incidence, weight_ND, x_TD)  # type: ignore[return-value]


def combine(incidence: Incidence, scale_TK: Tensor, weight_ND: Tensor) -> Tensor:
    """y_t = sum_k s_tk W[i_tk], [T, D]."""
    return _Combine.apply(incidence, scale_TK, weight_ND)  # type: ignore[return-value]
