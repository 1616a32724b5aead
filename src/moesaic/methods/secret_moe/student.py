"""One FFN's student: the layer's own neurons as shared network and experts, all of them trainable.

It computes what the converted FFN will compute, all neurons at once: experts are few and wide, and a step costs about a
step of the dense FFN. Weights of the chosen experts are K times the softmax over their scores.

Axes: T tokens, D model width, P packed neurons, S shared ones, E experts, M neurons per expert, K active experts, R
router rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.materialise.pack import TENSOR_NAMES, pack
from moesaic.nn.ffn import FFNWeights, combine

_READ = ("gate_FD", "up_FD", "gate_bias_F", "up_bias_F")


class CoarseStudent(nn.Module):
    """A plan as a trainable module.

    Args:
        weights: The dense FFN, float32.
        start: Its split; linear router without bias, or static.
        x_TD: Inputs that set the scale of the scores.
        rank: Of the router; None or at least E leaves it full.
        spread: Standard deviation of the scores on ``x_TD``.
    """

    real_P: Tensor

    def __init__(self, weights: FFNWeights, start: LayerPlan, x_TD: Tensor, rank: int | None, spread: float) -> None:
        super().__init__()
        self.start = start
        self.activation, self.act = weights.activation, weights.act
        packed = pack(weights, start)
        tensors = {field: packed[name] for field, name in TENSOR_NAMES.items() if name in packed}
        self.read = nn.ParameterDict({field: tensors[field].clone() for field in _READ if field in tensors})
        self.down_DP = nn.Parameter(tensors["down_DF"].clone())
        bias_D = tensors.get("down_bias_D")
        self.bias_D = None if bias_D is None else nn.Parameter(bias_D.clone())
        here = weights.up_FD.device
        self.register_buffer("real_P", (start.packed >= 0).float().to(here), persistent=False)
        self.router = nn.ParameterDict()
        if start.experts:
            rows_ED = start.router.tensors["weight"].to(here, torch.float32)
            for name, tensor in _factors(rows_ED, x_TD, rank, spread).items():
                self.router[name] = nn.Parameter(tensor)

    def scores(self, x_TD: Tensor) -> Tensor:
        """Router scores z_TE."""
        if "reduce" in self.router:
            x_TD = x_TD @ self.router["reduce"].T
        return x_TD @ self.router["weight"].T

    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TD."""
        read = self.read
        h_TP = F.linear(x_TD, read["up_FD"], read.get("up_bias_F"))
        if "gate_FD" in read:
            h_TP = combine(self.activation, self.act, F.linear(x_TD, read["gate_FD"], read.get("gate_bias_F")), h_TP)
        else:
            h_TP = self.act(h_TP)
        return F.linear(h_TP * self.weights(x_TD), self.down_DP, self.bias_D)

    def weights(self, x_TD: Tensor) -> Tensor:
        """The factor of every packed neuron, [T, P] (or [P] without experts): 1 if shared, else its expert's weight."""
        start = self.start
        if not start.experts:
            return self.real_P
        z_TE = self.scores(x_TD)
        top = z_TE.topk(start.top_k, dim=1)
        gate_TE = torch.zeros_like(z_TE).scatter(1, top.indices, start.top_k * torch.softmax(top.values, dim=1))
        ones_TS = x_TD.new_ones(len(x_TD), len(start.shared))
        return torch.cat([ones_TS, gate_TE.repeat_interleave(start.expert_width, dim=1)], dim=1) * self.real_P

    @torch.no_grad()
    def plan(self) -> LayerPlan:
        """What was learned, as a plan that computes the same."""

        def kept(tensor: Tensor) -> Tensor:
            return tensor.detach().clone()

        changes = {
            "readout": kept(self.down_DP),
            "bias": None if self.bias_D is None else kept(self.bias_D),
            "projections": {name: kept(tensor) for name, tensor in self.read.items()},
        }
        if self.start.experts:
            kind = "low_rank" if "reduce" in self.router else "linear"
            changes |= {"router": Router(kind, {name: kept(t) for name, t in self.router.items()})}
            changes |= {"gate": "softmax_topk"}
        return replace(self.start, **changes)


def _factors(weight_ED: Tensor, x_TD: Tensor, rank: int | None, spread: float) -> dict[str, Tensor]:
    """The router's rows, scaled and cut to their leading ``rank`` singular directions.

    Rows lose their mean over the experts, which changes neither choice nor softmax.
    """
    weight_ED = weight_ED - weight_ED.mean(0)
    z_TE = x_TD @ weight_ED.T
    weight_ED = weight_ED * (spread / float(z_TE.std().clamp_min(1e-12)))
    if rank is None or rank >= min(weight_ED.shape):
        return {"weight": weight_ED}
    # Singular directions of the scores on these inputs, not of the rows: what the inputs lack is not worth a rank.
    z_TE = (x_TD @ weight_ED.T).double()
    _, vectors_EE = torch.linalg.eigh(z_TE.T @ z_TE)
    top_ER = vectors_EE[:, -rank:].to(weight_ED.dtype)
    return {"weight": top_ER, "reduce": top_ER.T @ weight_ED}
