"""The converted FFN as it is trained: low-rank changes stay factors, loads of the experts are counted.

The runtime would add B A to W and slice the sum, which is right but makes the gradient of a whole matrix; here the
frozen slices have none.

Axes: T tokens, D model width, P packed neurons, E routed experts, K chosen, I and O inputs and outputs of a projection,
R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.nn.modeling_moesaic import MoEFeedForward
from moesaic.nn.moesaic_activation import gated
from moesaic.nn.moesaic_path_packed import Every
from moesaic.nn.moesaic_path_sorted import Sorted, by_expert
from moesaic.nn.moesaic_paths import ANY, Row


@dataclass(frozen=True)
class Factors:
    """One low-rank change: scale B A."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    dropout: nn.Module


@dataclass(frozen=True)
class Projection:
    """A frozen matrix with low-rank changes."""

    weight_OI: Tensor
    bias_O: Tensor | None
    factors: list[Factors] = field(default_factory=list)

    def rows(self, x_TI: Tensor, rows: slice) -> Tensor:
        """The outputs ``rows``."""
        y_TO = F.linear(x_TI, self.weight_OI[rows], None if self.bias_O is None else self.bias_O[rows])
        for part in self.factors:
            y_TO = y_TO + part.scale * F.linear(F.linear(part.dropout(x_TI), part.a_RI), part.b_OR[rows])
        return y_TO

    def columns(self, x_TI: Tensor, columns: slice) -> Tensor:
        """What the inputs ``columns`` give, without bias."""
        y_TO = F.linear(x_TI, self.weight_OI[:, columns])
        for part in self.factors:
            y_TO = y_TO + part.scale * F.linear(F.linear(part.dropout(x_TI), part.a_RI[:, columns]), part.b_OR)
        return y_TO


class AdaptedSorted(Sorted):
    """:class:`Sorted`, cast for autocast once, not for each matrix of each expert.

    Rows are then also rounded up to what oneDNN has compiled.
    """

    def __init__(self) -> None:
        super().__init__("packed")

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return ffn.routed

    def run(self, ffn: MoEFeedForward, x_TD: Tensor) -> Tensor:
        matrices, (idx_TK, weight_TK) = ffn.matrices(), ffn.choice(x_TD)
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):
            x_TD = x_TD.to(torch.get_autocast_dtype(device))
        return by_expert(ffn, matrices, x_TD, idx_TK, weight_TK)


class AdaptedFeedForward(MoEFeedForward):
    """A :class:`MoEFeedForward` in training; made of one by :func:`adapt`.

    Attributes:
        load_E: Tokens that chose each expert since it was last set to zero. No buffer: DDP would overwrite each
            process's own loads with those of the first.
    """

    table = (Row(AdaptedSorted(), {ANY: (0, None)}), Row(Every(), {ANY: (0, None)}))
    load_E: Tensor

    def matrices(self) -> Any:
        return self.gate_proj and _projection(self.gate_proj), _projection(self.up_proj), _projection(self.down_proj)

    def rows(self, matrices: Any, x_TD: Tensor, start: int, stop: int) -> Tensor:
        gate, up, down = matrices
        rows = slice(start, stop)
        h_TP = up.rows(x_TD, rows)
        h_TP = self.act_fn(h_TP) if gate is None else gated(self.act_fn, gate.rows(x_TD, rows), h_TP)
        return down.columns(h_TP, rows)

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        idx_TK, weight_TK = super()._route(x_TD)
        if self.training:
            counts_E = torch.bincount(idx_TK.flatten(), minlength=self.experts)
            self.load_E = self.load_E.to(counts_E.device) + counts_E
        return idx_TK, weight_TK


def adapt(model: nn.Module) -> None:
    """Let every :class:`MoEFeedForward` of a model compute as it is trained. Its tensors keep their names."""
    for module in model.modules():
        if type(module) is MoEFeedForward:  # experts that share neurons have a runtime of their own, which trains as is
            module.__class__ = AdaptedFeedForward
            module.load_E = torch.zeros(module.experts, device=module.up_proj.weight.device)


def _projection(layer: Any) -> Projection:
    """A linear layer, plain or wrapped by peft, as matrices."""
    base = getattr(layer, "base_layer", layer)
    factors = []
    if base is not layer and not layer.merged and not layer.disable_adapters:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                a_RI, b_OR = layer.lora_A[name].weight, layer.lora_B[name].weight
                factors.append(Factors(a_RI, b_OR, layer.scaling[name], layer.lora_dropout[name]))
    return Projection(base.weight, base.bias, factors)
