"""The `moesaic` architecture, part 3: overlapping experts that are stored once (see `modeling_moesaic.py`).

The rows of the matrices are [shared; union], where the union holds every neuron that is in any expert, and a table says
which expert has which. The union's order makes an expert few runs of neighbouring rows, if its neighbours' sets allow.

Axes: T tokens, D model width, E routed experts, U neurons of the union, M neurons of a run, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .moesaic_ffn import GAP_ROWS, Matrices, MoEFeedForward, down, hidden, matmuls

# Measured on one thread of a Zen 4 CPU at 896 x 4864, eight top-1 experts of about half the neurons.
SORT_FROM = 64  # tokens per expert; below, copying rows per expert costs more than the masked path: dense at most
SPARE_ROWS = 0.25  # an expert's own tokens: if bridging its gaps computes more unused rows than this, rows are copied

Run = tuple[int, int]


class UnionFeedForward(MoEFeedForward):
    """A feed-forward network whose experts share neurons. Computes what it would with a copy for each expert.

    Args: as of :class:`MoEFeedForward`; `neurons` is S + U.

    Few tokens: a row that several chosen experts have is computed once and weighed by their sum. Many tokens: each
    expert gets its own, over its runs of rows, or over a copy of its rows where the runs are too many.
    """

    membership: Tensor

    def __init__(self, spec: dict[str, Any], d_model: int, activation: str) -> None:
        super().__init__(spec, d_model, activation)
        union = spec["neurons"] - spec["shared"]
        self.register_buffer("membership", torch.zeros(self.experts, union, dtype=torch.bool))
        self._places: tuple[Tensor, list[Tensor], list[list[Run]]] | None = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._places = None

    def _prefers_sort(self, x_TD: Tensor) -> bool:
        return x_TD.shape[0] >= SORT_FROM * self.experts and super()._prefers_sort(x_TD)

    def places(self) -> tuple[list[Tensor], list[list[Run]]]:
        """Of each expert: the rows [M] that it has, and their runs, bridged over gaps of up to ``GAP_ROWS``."""
        if self._places is None or self._places[0] is not self.membership:
            with torch.inference_mode(False):  # kept, and a later forward may be one of training
                rows = [row_U.nonzero().flatten() + self.shared for row_U in self.membership]
            self._places = self.membership, rows, [_runs_of(row_M) for row_M in rows]
        return self._places[1:]

    def _every(self, matrices: Matrices, x_TD: Tensor) -> Tensor:
        times_TU = self.membership.sum(0).to(x_TD.dtype).expand(len(x_TD), -1)
        return self._weighed(matrices, x_TD, [(0, matrices.up_PD.shape[0])], times_TU)

    def _masked(self, matrices: Matrices, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
        ones_TE = x_TD.new_zeros(len(x_TD), self.experts)
        weight_TE = ones_TE.scatter(1, idx_TK, 1 if weight_TK is None else weight_TK)
        if x_TD.is_meta or torch.compiler.is_compiling():
            runs = [(0, matrices.up_PD.shape[0])]
        else:
            own = self.places()[1]
            chosen = [own[e] for e in set(idx_TK.flatten().tolist())]
            runs = _bridged(sorted([(0, self.shared)] * (self.shared > 0) + [run for runs in chosen for run in runs]))
        return self._weighed(matrices, x_TD, runs, weight_TE @ self.membership.to(x_TD.dtype))

    def _weighed(self, matrices: Matrices, x_TD: Tensor, runs: list[Run], weight_TU: Tensor) -> Tensor:
        """Sum of the neurons of ``runs``, those of the union times their weight."""
        up_matmul, down_matmul = matmuls(x_TD)
        y_TD = torch.zeros_like(x_TD)
        for start, stop in runs:
            h_TM = hidden(matrices, self.act, x_TD, start, stop, up_matmul)
            shared = max(0, self.shared - start)
            weighed_TM = h_TM[:, shared:] * weight_TU[:, start + shared - self.shared : stop - self.shared]
            h_TM = torch.cat([h_TM[:, :shared], weighed_TM], dim=1) if shared else weighed_TM
            y_TD = y_TD + down(matrices, h_TM, start, stop, down_matmul)
        return y_TD

    def _expert(self, matrices: Matrices, e: int, x_TD: Tensor) -> Tensor:
        all_rows, all_runs = self.places()
        rows, runs = all_rows[e], all_runs[e]
        if sum(stop - start for start, stop in runs) <= (1 + SPARE_ROWS) * len(rows):
            member_TU = self.membership[e].to(x_TD.dtype).expand(len(x_TD), -1)
            return self._weighed(matrices, x_TD, runs, member_TU)
        return self._rows(_taken(matrices, rows), x_TD, 0, len(rows))


def _taken(matrices: Matrices, rows_M: Tensor) -> Matrices:
    """Copies of some rows."""
    *of_rows, down_DP = matrices
    picked = [None if tensor is None else tensor.index_select(0, rows_M) for tensor in of_rows]
    return Matrices(picked[0], picked[1], matrices.up_PD.index_select(0, rows_M), picked[3], down_DP[:, rows_M])


def _runs_of(rows_M: Tensor) -> list[Run]:
    starts = [0, *((rows_M[1:] - rows_M[:-1] > GAP_ROWS).nonzero().flatten() + 1).tolist(), len(rows_M)]
    return [(int(rows_M[first]), int(rows_M[last - 1]) + 1) for first, last in pairwise(starts) if last > first]


def _bridged(runs: Iterable[Run]) -> list[Run]:
    """Ascending runs, joined where they overlap or a gap is narrow."""
    joined: list[Run] = []
    for start, stop in runs:
        if joined and start - joined[-1][1] <= GAP_ROWS:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def build_feed_forward(spec: dict[str, Any], d_model: int, activation: str) -> MoEFeedForward:
    """The module for an FFN's spec."""
    return (UnionFeedForward if spec.get("union") else MoEFeedForward)(spec, d_model, activation)
