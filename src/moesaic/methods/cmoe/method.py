"""CMoE (arXiv 2502.04416): neurons that nearly every token needs are shared, the others grouped by co-activation.

Equations, for an FFN of F neurons, T calibration tokens x and the layout SxAyEz with units of m = F / z neurons:

1. Scores with unit rows and unit inputs, h^ = act(W^_g x^) * (W^_u x^); marker a_ti = 1 for the K_a largest |h^_t|;
   rate mu_i = mean_t a_ti (section 3 of the paper; :mod:`moesaic.solvers.markers`).
2. Shared expert: the x m neurons of largest mu. Routed: the other columns of A, clustered into N = z - x experts of m
   neurons each at least total L1 distance to the centroids. First centroids: the columns of the N largest remaining mu.
3. Representative R_j: the member whose column is nearest to the mean column of expert j.
4. Router u_j(x) = |(W^_u[R_j] x) act(W^_g[R_j] x)|, p = softmax(u). Chosen: the y largest of p + b; weight 1 + p_j s_j;
   b = s = 0, so every chosen expert has weight exactly 1.

Readings of ours: the representative is compared with the mean of its final cluster; biases enter as (w.x + b) / |w|;
without a gate the score is act(W^_u x^). Ties go to the lowest neuron index, except among equally good balanced
assignments, where the solver's order decides (the same for the same markers).

The marks are integers and all statistics integer sums: the plan depends neither on the number of threads nor on
``compute_dtype``, nor on ``seed``: nothing here is random.

Axes: T tokens, D model width, F neurons, N routed neurons, E routed experts, M neurons per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.blueprint.layout import Layout
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.methods.cmoe.config import Config
from moesaic.methods.routed import pad_experts
from moesaic.nn.ffn import FFNWeights
from moesaic.options.device import native_bfloat16
from moesaic.solvers.assignment import balanced_assignment
from moesaic.solvers.balance import balance_bias
from moesaic.solvers.markers import Markers, atopk, cluster_counts, column_distances, normalised

# Tokens whose scores are held at a time: small enough to stay near the caches.
_SCORE_BATCH = 512
# Tokens per update of the selection bias: the batch of the paper's fine-tuning, 2 x 2048.
_BALANCE_BATCH = 4096


@torch.no_grad()
def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Config, seed: int) -> LayerPlan:
    """Carve one FFN; see :class:`moesaic.methods.base.MethodModule`. ``seed`` is not used.

    Raises:
        InputError: no calibration tokens, inputs with NaN or Inf, more units or markers than neurons.
    """
    config.check(weights.d_ff)
    layout = Layout.parse(config.layout)
    if layout.routed == 0:
        return LayerPlan(weights.d_ff, torch.arange(weights.d_ff))
    if inputs is None or inputs.tokens == 0:
        raise InputError("CMoE has no calibration tokens for this FFN", "give calibration text")

    markers = _markers(weights, inputs, config)
    shared, experts, representatives_E = carve(markers, layout, config.iterations)
    router = analytic_router(weights, representatives_E)
    bias_E = torch.zeros(layout.routed)
    if config.balance_steps > 0:
        prob_TE = torch.cat([router_probabilities(router, x_TD, weights) for x_TD in inputs.batches()])
        bias_E = balance_bias(prob_TE, layout.active, config.balance_steps, config.balance_rate, _BALANCE_BATCH).float()
    return LayerPlan(
        d_ff=weights.d_ff,
        shared=shared,
        experts=pad_experts(experts),
        top_k=layout.active,
        router=router,
        gate="scaled",
        selection_bias=bias_E,
        gate_scale=torch.zeros(layout.routed),
    )


def _markers(weights: FFNWeights, inputs: SiteInputs, config: Config) -> Markers:
    """The marks of all tokens, which the processes of a team share out."""

    def marked(rows: slice) -> Tensor:
        batches = inputs.part(rows).batches(_SCORE_BATCH)
        return atopk(weights, batches, config.markers_per_token, _dtype(config, weights)).idx_TK

    return Markers(inputs.team.rows(inputs.tokens, _SCORE_BATCH, marked), weights.d_ff)


def _dtype(config: Config, weights: FFNWeights) -> torch.dtype:
    """The precision of the first pass. ``auto`` takes bfloat16 only where marks are rare: scores far below the largest
    have larger relative errors, and an FFN as small as that is quick in float32."""
    if config.compute_dtype == "auto":
        rare = weights.d_ff >= 32 * config.markers_per_token
        return torch.bfloat16 if rare and native_bfloat16(weights.up_FD.device) else torch.float32
    return getattr(torch, config.compute_dtype)


def carve(markers: Markers, layout: Layout, iterations: int = 1) -> tuple[Tensor, list[Tensor], Tensor]:
    """Partition the neurons by their markers (sections 3 and 4 of the paper).

    Returns:
        Shared neurons, ascending, int64 [S]; the experts' neurons, ascending, int64 [M] each, sizes as
        ``layout.expert_sizes`` says; the experts' representatives, int64 [E].
    """
    sizes = layout.expert_sizes(markers.d_ff)
    order_F = torch.argsort(markers.counts, descending=True, stable=True)
    shared, rest_N = order_F.tensor_split([layout.shared_size(markers.d_ff)])
    first_E, rest_N = rest_N[: len(sizes)], rest_N.sort().values

    here = markers.idx_TK.device
    label_F = torch.full((markers.d_ff,), -1, device=here)
    label_F[first_E] = torch.arange(len(sizes), device=here)
    distance_FE = _distances(markers, label_F, [1] * len(sizes))
    for _ in range(iterations):
        before_N = label_F[rest_N]
        label_F[rest_N] = balanced_assignment(distance_FE[rest_N], sizes).to(here)
        if torch.equal(label_F[rest_N], before_N):
            break
        distance_FE = _distances(markers, label_F, sizes)
    experts = [torch.nonzero(label_F == expert).flatten() for expert in range(len(sizes))]
    # numpy's argmin returns the first of equal minima, that is the lowest index.
    nearest = [int(distance_FE[members, expert].cpu().numpy().argmin()) for expert, members in enumerate(experts)]
    representatives_E = torch.stack([members[near] for members, near in zip(experts, nearest, strict=True)])
    return shared.sort().values, experts, representatives_E


def _distances(markers: Markers, label_F: Tensor, sizes: list[int]) -> Tensor:
    """L1 distance of each column to the mean column of each cluster, float64 [F, E]."""
    sizes_E = torch.tensor(sizes).to(label_F.device)
    return column_distances(markers, cluster_counts(markers, label_F, len(sizes)), sizes_E)


def analytic_router(weights: FFNWeights, representatives_E: Tensor) -> Router:
    """The gated router: the normalised rows of each expert's representative (section 5 of the paper), float32."""
    rows = normalised(weights.take(representatives_E))
    tensors = {"up": rows.up_FD, "gate": rows.gate_FD, "up_bias": rows.up_bias_F, "gate_bias": rows.gate_bias_F}
    return Router("gated", {name: tensor for name, tensor in tensors.items() if tensor is not None})


def router_probabilities(router: Router, x_TD: Tensor, weights: FFNWeights) -> Tensor:
    """p = softmax over the experts of the gated router's scores, float64 [T, E]; inputs are not normalised.

    ``weights``: Of the FFN; only its activation is read.
    """
    rows = {name: tensor.to(x_TD.device) for name, tensor in router.tensors.items()}
    unit = FFNWeights(
        up_FD=rows["up"],
        down_DF=rows["up"].T,  # not read
        activation=weights.activation,
        learned=weights.learned,
        gate_FD=rows.get("gate"),
        gate_bias_F=rows.get("gate_bias"),
        up_bias_F=rows.get("up_bias"),
    )
    return unit.to(torch.float64).hidden(x_TD.double()).abs().softmax(dim=1)
