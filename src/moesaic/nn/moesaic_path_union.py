"""The `moesaic` architecture: paths for experts that share rows (see `moesaic_paths.py`).

Axes: T tokens, D model width, E routed experts, U neurons of the union, M neurons of a run, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .moesaic_slices import GAP_ROWS, Matrices, down, hidden, matmuls

if TYPE_CHECKING:
    from .moesaic_ffn import MoEFeedForward
    from .moesaic_union import Run, UnionFeedForward


class UnionEvery:
    """Every neuron times the number of experts that have it, where nothing is routed."""

    name, layout = "every", "union"

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return not ffn.routed

    def run(self, ffn: UnionFeedForward, x_TD: Tensor) -> Tensor:
        times_TU = ffn.membership.sum(0).to(x_TD.dtype).expand(len(x_TD), -1)
        return weighed(ffn, ffn.matrices(), x_TD, [(0, ffn.neurons)], times_TU)


class UnionMasked:
    """All tokens through all rows that a chosen expert has, each row once, times the weights of a token's experts."""

    name, layout = "masked", "union"

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return ffn.routed

    def run(self, ffn: UnionFeedForward, x_TD: Tensor) -> Tensor:
        matrices, (idx_TK, weight_TK) = ffn.matrices(), ffn.choice(x_TD)
        ones_TE = x_TD.new_zeros(len(x_TD), ffn.experts)
        weight_TE = ones_TE.scatter(1, idx_TK, 1 if weight_TK is None else weight_TK)
        if x_TD.is_meta or torch.compiler.is_compiling():
            runs = [(0, ffn.neurons)]
        else:
            own = ffn.places()[1]
            chosen = [own[e] for e in set(idx_TK.flatten().tolist())]
            runs = _bridged(sorted([(0, ffn.shared)] * (ffn.shared > 0) + [run for runs in chosen for run in runs]))
        # In the memory order of what it will be multiplied with: (W x^T)^T is stored by neurons.
        member_UE = ffn.membership.to(x_TD.dtype).t()
        by_neurons = matmuls(x_TD)[0] is not F.linear
        weight_TU = (member_UE @ weight_TE.t()).t() if by_neurons else weight_TE @ member_UE.t()
        return weighed(ffn, matrices, x_TD, runs, weight_TU)


def weighed(ffn: UnionFeedForward, matrices: Matrices, x_TD: Tensor, runs: list[Run], weight_TU: Tensor) -> Tensor:
    """Sum of the neurons of ``runs``, those of the union times their weight."""
    up_matmul, down_matmul = matmuls(x_TD)
    y_TD = torch.zeros_like(x_TD)
    for start, stop in runs:
        h_TM = hidden(matrices, ffn.act_fn, x_TD, start, stop, up_matmul)
        shared = max(0, ffn.shared - start)
        weight_TM = weight_TU[:, start + shared - ffn.shared : stop - ffn.shared]
        if torch.is_grad_enabled():
            h_TM = torch.cat([h_TM[:, :shared], h_TM[:, shared:] * weight_TM], dim=1)
        else:
            h_TM[:, shared:] *= weight_TM
        y_TD = y_TD + down(matrices, h_TM, start, stop, down_matmul)
    return y_TD


def _bridged(runs: Iterable[Run]) -> list[Run]:
    """Ascending runs, joined where they overlap or a gap is narrow."""
    joined: list[Run] = []
    for start, stop in runs:
        if joined and start - joined[-1][1] <= GAP_ROWS:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
