"""The `moesaic` architecture: paths for experts that share rows (see `moesaic_paths.py`).

Axes: T tokens, D model width, E routed experts, U neurons of the union, M neurons of a run, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .moesaic_slices import GAP_ROWS, TURNED_FROM, Matmul, Matrices, Members, Weights, down, hidden, matmuls

if TYPE_CHECKING:
    from .moesaic_ffn import MoEFeedForward
    from .moesaic_union import Run, UnionFeedForward

ALL_CHOSEN = 4  # choices per expert from which hardly one is idle


class UnionEvery:
    """Every neuron times the number of experts that have it, where nothing is routed."""

    name, layout = "every", "union"

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return not ffn.routed

    def run(self, ffn: UnionFeedForward, x_TD: Tensor) -> Tensor:
        times_TU = ffn.membership.sum(0).to(x_TD.dtype).expand(len(x_TD), -1)
        weights = Weights(times_TU, 1, ffn.shared)
        return weighed(ffn, ffn.matrices(), x_TD, [(0, ffn.neurons)], weights, matmuls(x_TD))


class UnionMasked:
    """All tokens through all rows that a chosen expert has, each row once, times the weights of a token's experts."""

    name, layout = "masked", "union"

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return ffn.routed

    def run(self, ffn: UnionFeedForward, x_TD: Tensor) -> Tensor:
        return masked(ffn, ffn.matrices(), x_TD)


def masked(ffn: UnionFeedForward, matrices: Matrices, x_TD: Tensor) -> Tensor:
    """y_TD of :class:`UnionMasked`."""
    idx_TK, weight_TK = ffn.choice(x_TD)
    runs = runs_of_any(ffn, idx_TK)
    matmul = matmuls(x_TD)
    if matrices.between is not None and (len(x_TD) >= TURNED_FROM or matmul[0] is F.linear):
        members = Members(idx_TK, weight_TK, ffn.membership, ffn.shared)
        return weighed(ffn, matrices, x_TD, runs, members, (F.linear, matmul[1]))
    ones_TE = x_TD.new_zeros(len(x_TD), ffn.experts)
    weight_TE = ones_TE.scatter(1, idx_TK, 1 if weight_TK is None else weight_TK)
    # In the memory order of what it will be multiplied with: (W x^T)^T is stored by neurons.
    member_UE = ffn.membership.to(x_TD.dtype).t()
    by_neurons = matmul[0] is not F.linear
    weight_TU = (member_UE @ weight_TE.t()).t() if by_neurons else weight_TE @ member_UE.t()
    return weighed(ffn, matrices, x_TD, runs, Weights(weight_TU, 1, ffn.shared), matmul)


def runs_of_any(ffn: UnionFeedForward, idx_TK: Tensor) -> list[Run]:
    """Rows that any chosen expert has, and the shared ones, in runs. Of many choices it is all rows."""
    if idx_TK.is_meta or torch.compiler.is_compiling() or idx_TK.numel() >= ALL_CHOSEN * ffn.experts:
        return [(0, ffn.neurons)]
    own = ffn.places()[1]
    chosen = [own[e] for e in set(idx_TK.flatten().tolist())]
    return _bridged(sorted([(0, ffn.shared)] * (ffn.shared > 0) + [run for runs in chosen for run in runs]))


def weighed(
    ffn: UnionFeedForward,
    matrices: Matrices,
    x_TD: Tensor,
    runs: list[Run],
    weights: Weights | Members,
    matmul: tuple[Matmul, Matmul],
) -> Tensor:
    """Sum of the neurons of ``runs``, those of the union times their weight."""
    y_TD = None
    for start, stop in runs:
        h_TM = hidden(matrices, ffn.act_fn, x_TD, start, stop, matmul[0], weights)
        part_TD = down(matrices, h_TM, start, stop, matmul[1])
        y_TD = part_TD if y_TD is None else y_TD + part_TD
    return torch.zeros_like(x_TD) if y_TD is None else y_TD


def _bridged(runs: Iterable[Run]) -> list[Run]:
    """Ascending runs, joined where they overlap or a gap is narrow."""
    joined: list[Run] = []
    for start, stop in runs:
        if joined and start - joined[-1][1] <= GAP_ROWS:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
