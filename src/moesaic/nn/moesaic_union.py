"""The `moesaic` architecture: overlapping experts that are stored once (see `modeling_moesaic.py`).

The rows of the matrices are [shared; union], where the union holds every neuron that is in any expert, and a table says
which expert has which. The union's order makes an expert few runs of neighbouring rows, if its neighbours' sets allow.

Axes: T tokens, D model width, E routed experts, U neurons of the union, M neurons of a run, K experts per token.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from .moesaic_ffn import MoEFeedForward
from .moesaic_nested import NestedFeedForward
from .moesaic_neurons import NeuronFeedForward
from .moesaic_path_union import weighed
from .moesaic_slices import GAP_ROWS, Matrices, Weights, matmuls

SPARE_ROWS = 0.25  # an expert's own tokens: if bridging its gaps computes more unused rows than this, rows are copied

Run = tuple[int, int]


class UnionFeedForward(MoEFeedForward):
    """A feed-forward network whose experts share neurons. Computes what it would with a copy for each expert.

    Args: as of :class:`MoEFeedForward`; `neurons` is S + U.

    An expert alone is computed over its runs of rows, or over a copy of its rows where the runs are too many.
    """

    layout: ClassVar[str] = "union"
    membership: Tensor

    def __init__(self, spec: dict[str, Any], d_model: int, activation: str) -> None:
        super().__init__(spec, d_model, activation)
        union = spec["neurons"] - spec["shared"]
        self.register_buffer("membership", torch.zeros(self.experts, union, dtype=torch.bool))
        self._places: tuple[Tensor, list[Tensor], list[list[Run]]] | None = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._places = None

    def places(self) -> tuple[list[Tensor], list[list[Run]]]:
        """Of each expert: the rows [M] that it has, and their runs, bridged over gaps of up to ``GAP_ROWS``."""
        if self._places is None or self._places[0] is not self.membership:
            with torch.inference_mode(False):  # kept, and a later forward may be one of training
                rows = [row_U.nonzero().flatten() + self.shared for row_U in self.membership]
            self._places = self.membership, rows, [_runs_of(row_M) for row_M in rows]
        return self._places[1:]

    def expert_rows(self, matrices: Matrices, e: int, x_TD: Tensor) -> Tensor:
        all_rows, all_runs = self.places()
        rows, runs = all_rows[e], all_runs[e]
        if sum(stop - start for start, stop in runs) <= (1 + SPARE_ROWS) * len(rows):
            member_TU = self.membership[e].to(x_TD.dtype).expand(len(x_TD), -1)
            weights = Weights(member_TU, 1, self.shared)
            return weighed(self, matrices, x_TD, runs, weights, matmuls(x_TD))
        return self.rows(_taken(matrices, rows), x_TD, 0, len(rows))


def _taken(matrices: Matrices, rows_M: Tensor) -> Matrices:
    """Copies of some rows."""
    down_DP = matrices.down_DP
    by_rows = down_DP.stride(0) == 1  # it lies side by side with the others: then its columns are whole in memory
    down_DM = down_DP.t().index_select(0, rows_M).t() if by_rows else down_DP[:, rows_M]
    of_rows = {name: getattr(matrices, name) for name in ("gate_PD", "gate_bias_P", "up_PD", "up_bias_P")}
    picked = {name: None if tensor is None else tensor.index_select(0, rows_M) for name, tensor in of_rows.items()}
    return matrices._replace(down_DP=down_DM, **picked)


def _runs_of(rows_M: Tensor) -> list[Run]:
    starts = [0, *((rows_M[1:] - rows_M[:-1] > GAP_ROWS).nonzero().flatten() + 1).tolist(), len(rows_M)]
    return [(int(rows_M[first]), int(rows_M[last - 1]) + 1) for first, last in pairwise(starts) if last > first]


def build_feed_forward(spec: dict[str, Any], d_model: int, activation: str) -> MoEFeedForward:
    """The module for an FFN's spec."""
    if spec.get("weights") == "int8":
        return NestedFeedForward(spec, d_model, activation)
    if spec["router"] == "low_bit":
        return NeuronFeedForward(spec, d_model, activation)
    return (UnionFeedForward if spec.get("union") else MoEFeedForward)(spec, d_model, activation)
