"""The `moesaic` architecture: paths for experts that are runs of rows (see `moesaic_paths.py`).

Axes: T tokens, D model width, E routed experts, M neurons of a run, K experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .moesaic_slices import GAP_ROWS, TURNED_FROM, Matrices, Weights, down, hidden, matmuls

if TYPE_CHECKING:
    from .moesaic_ffn import MoEFeedForward


class Every:
    """The shared expert and all others with weight 1: one product, where nothing is routed."""

    name, layout = "every", "packed"

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return not ffn.routed

    def run(self, ffn: MoEFeedForward, x_TD: Tensor) -> Tensor:
        return ffn.rows(ffn.matrices(), x_TD, 0, ffn.neurons)


class Masked:
    """All tokens through all rows that some token uses; what a token did not choose is zeroed before going down.

    Neighbouring experts are one matrix. It costs the active rows, at most the dense network. While compiling, it is
    one graph of fixed shapes.
    """

    name, layout = "masked", "packed"

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return ffn.routed

    def run(self, ffn: MoEFeedForward, x_TD: Tensor) -> Tensor:
        return masked(ffn, ffn.matrices(), x_TD)


def masked(ffn: MoEFeedForward, matrices: Matrices, x_TD: Tensor) -> Tensor:
    """y_TD of :class:`Masked`."""
    idx_TK, weight_TK = ffn.choice(x_TD)
    tokens, runs = x_TD.shape[0], _runs(ffn, idx_TK)
    weights = None
    if tokens > 1 or weight_TK is not None or sum(last - max(first, 0) for first, last in runs) > ffn.top_k:
        weight_TE = x_TD.new_zeros(tokens, ffn.experts).scatter(1, idx_TK, 1 if weight_TK is None else weight_TK)
        weights = Weights(weight_TE, ffn.width, ffn.shared)
    up_matmul, down_matmul = matmuls(x_TD)
    if matrices.between is not None and tokens >= TURNED_FROM:
        up_matmul = F.linear
    y_TD = None
    for first, last in runs:  # expert -1 stands for the shared one
        start = ffn.shared + first * ffn.width if first >= 0 else 0
        stop = ffn.shared + last * ffn.width
        h_TM = hidden(matrices, ffn.act_fn, x_TD, start, stop, up_matmul, weights)
        part_TD = down(matrices, h_TM, start, stop, down_matmul)
        y_TD = part_TD if y_TD is None else y_TD + part_TD
    return torch.zeros_like(x_TD) if y_TD is None else y_TD


def _runs(ffn: MoEFeedForward, idx_TK: Tensor) -> list[tuple[int, int]]:
    """Chosen experts as half-open ranges of neighbours and near neighbours; the shared expert is -1, next to 0."""
    if idx_TK.is_meta or torch.compiler.is_compiling() or idx_TK.numel() >= 4 * ffn.experts:
        active = range(ffn.experts)
    else:
        active = sorted(set(idx_TK.flatten().tolist()))
    runs: list[tuple[int, int]] = [(-1, 0)] if ffn.shared else []
    gap = GAP_ROWS // max(ffn.width, 1)
    for e in active:
        if runs and e - runs[-1][1] <= gap:
            runs[-1] = (runs[-1][0], e + 1)
        else:
            runs.append((e, e + 1))
    return runs
