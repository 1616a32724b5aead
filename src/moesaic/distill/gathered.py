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

    def product(self, weight_ND: Tensor, operand: Tensor, sampled: bool) -> Tensor:
        """Without gradient: s_TK of ``operand`` x_TD if ``sampled``, else y_TD of ``operand`` s_TK."""
        if sampled:
            return self._dots(weight_ND, operand)
        return F.embedding_bag(self.index_TK, weight_ND, per_sample_weights=operand.contiguous(), mode="sum")

    def _dots(self, weight_ND: Tensor, x_TD: Tensor) -> Tensor:
        """s_TK: a product sampled where the sparse matrix of incidences has entries."""
        tokens, k = self.index_TK.shape
        with warnings.catch_warnings():  # torch calls its CSR tensors beta, once per process
            warnings.simplefilter("ignore", UserWarning)
            pattern = torch.sparse_csr_tensor(
                torch.arange(0, tokens * k + 1, k, device=x_TD.device),
                self.index_TK.flatten(),
                x_TD.new_zeros(tokens * k),
                size=(tokens, self.rows),
                check_invariants=False,
            )
        sampled = torch.sparse.sampled_addmm(pattern, x_TD.contiguous(), weight_ND.t(), beta=0.0)
        return sampled.values().view(tokens, k)

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


class _Product(torch.autograd.Function):
    """``dots`` of the rows with tokens, or ``combine`` with scales: each is the other's derivative by that operand."""

    @staticmethod
    def forward(ctx: Any, incidence: Incidence, weight_ND: Tensor, operand: Tensor, sampled: bool) -> Tensor:
        ctx.incidence, ctx.sampled = incidence, sampled
        ctx.save_for_backward(weight_ND, operand)
        return incidence.product(weight_ND, operand, sampled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        weight_ND, operand = ctx.saved_tensors
        _, for_weight, for_operand, _ = ctx.needs_input_grad
        scale_TK, tokens_TD = (grads[0], operand) if ctx.sampled else (operand, grads[0])
        return (
            None,
            ctx.incidence.spread(scale_TK, tokens_TD) if for_weight else None,
            ctx.incidence.product(weight_ND, grads[0], not ctx.sampled) if for_operand else None,
            None,
        )


def dots(incidence: Incidence, weight_ND: Tensor, x_TD: Tensor) -> Tensor:
    """s_tk = <W[i_tk], x_t>, [T, K]."""
    return _Product.apply(incidence, weight_ND, x_TD, True)  # type: ignore[return-value]


def combine(incidence: Incidence, scale_TK: Tensor, weight_ND: Tensor) -> Tensor:
    """y_t = sum_k s_tk W[i_tk], [T, D]."""
    return _Product.apply(incidence, weight_ND, scale_TK, False)  # type: ignore[return-value]
