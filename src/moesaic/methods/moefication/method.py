"""MoEfication (Zhang et al., Findings of ACL 2022, arXiv 2110.01786): neurons with similar weights make an expert.

Equations: with rows w_j of the input projection and r_j = w_j / |w_j|, balanced k-means on the r_j gives the experts
I_e and their centres c_e = mean of r_j over I_e. A token prefers the experts of largest -|x/|x| - c_e|. As x/|x| has
length 1, that is the order of z_e = c_e . x/|x| - |c_e|^2 / 2, a linear router on the normalised input. Chosen experts
count with weight 1. No data.

Not here: the paper's co-activation split and its trained two-layer router. Made for ReLU; see
docs/methods/moefication.md.

Axes: D model width, F neurons, E routed experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.methods.moefication.config import Config, resolve_layout
from moesaic.methods.routed import routed_plan
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.energy import neuron_norms, neuron_scores
from moesaic.solvers.kmeans import balanced_kmeans, unit_rows


def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Config, seed: int) -> LayerPlan:
    """Cluster the neurons and read the router off the centres; see :class:`moesaic.methods.base.MethodModule`."""
    layout = resolve_layout(config, weights.d_ff)
    shared, rest = _shared_neurons(weights, layout.shared_size(weights.d_ff))
    if layout.routed == 0:
        return routed_plan(weights.d_ff, layout, shared, [], Router("static"))
    rows = unit_rows(_input_rows(weights, config.matrix)[rest])
    clusters = balanced_kmeans(rows, layout.expert_sizes(weights.d_ff), rounds=config.rounds, seed=seed)
    experts = [rest[members] for members in clusters.members()]
    return routed_plan(weights.d_ff, layout, shared, experts, similarity_router(clusters.centroids_ED))


def similarity_router(centres_ED: Tensor) -> Router:
    """Linear router on x/|x| that ranks the experts as -|x/|x| - c_e| does."""
    tensors = {"weight": centres_ED.float(), "bias": -centres_ED.float().square().sum(dim=1) / 2}
    return Router("linear", tensors, normalise_input=True)


def _input_rows(weights: FFNWeights, matrix: str) -> Tensor:
    if matrix == "gate" and weights.gate_FD is None:
        raise InputError("matrix=gate, but this FFN has no gate projection", "use matrix=up or matrix=auto")
    return weights.up_FD if matrix == "up" or weights.gate_FD is None else weights.gate_FD


def _shared_neurons(weights: FFNWeights, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` neurons of largest data-free score and the others, both ascending [OURS]."""
    if count == 0:
        every_F = torch.arange(weights.d_ff, device=weights.up_FD.device)
        return every_F[:0], every_F
    score_F = neuron_scores(*neuron_norms(weights.gate_FD, weights.up_FD, weights.down_DF))
    order_F = torch.argsort(score_F, descending=True, stable=True)
    return order_F[:count].sort().values, order_F[count:].sort().values
