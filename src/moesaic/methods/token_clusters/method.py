"""Token clusters: experts for groups of tokens that a linear router can tell apart, and refitted readouts.

Source: ours [OURS]; docs/methods/token_clusters.md says why. For an FFN of F neurons, on the calibration inputs x:

1. Energy share of neuron i for token t: q_ti = u_t (h_ti |W_d[:, i]|)^2 / sum_j (h_tj |W_d[:, j]|)^2, with u_t the
   part of the FFN's output in the residual stream (``token_weight``; mean 1).
2. ``overlapping`` and ``union``: E sets of neurons and a linear router by alternation
   (:mod:`moesaic.solvers.token_clusters`), one expert per token; of a union, sets as large as pays for their tokens
   (:mod:`moesaic.solvers.free_widths`). ``disjoint``: the S neurons of largest mean share are
   shared, the others form E balanced clusters of neurons that the same tokens want, as far as a linear map of x
   predicts it; a linear router, ridge on the amplitudes of the clusters, chooses K of them. Chosen experts have
   weight 1.
3. Readout: least squares for the down projection on the tokens as they are routed, each of weight u_t / |y|^2: one
   matrix for all experts, shrunk to W_d; then each overlapping expert's own, shrunk to that
   (:mod:`moesaic.solvers.refit`). Shared neurons keep the common readout.

Axes: T tokens, D model width, F neurons, S shared neurons, E experts, M neurons per expert, K active experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesaic.blueprint.layer import STATIC, LayerPlan, Router
from moesaic.blueprint.shape import FFNShape
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.methods.routed import pad_experts
from moesaic.methods.token_clusters.config import Config
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.energy import mean_output_energy
from moesaic.solvers.free_widths import cluster_tokens_freely
from moesaic.solvers.kmeans import balanced_kmeans
from moesaic.solvers.products import BLOCK, check_finite, rounded_products, scale_rows
from moesaic.solvers.refit import refit, refit_few, stream_weights, token_weights
from moesaic.solvers.router_fit import energy_targets, fit_ridge, top_k_sets
from moesaic.solvers.team import Team
from moesaic.solvers.token_clusters import cluster_tokens, largest, mean_rows, neuron_shares, predicted_patterns

_BATCH = 2048


@dataclass(frozen=True)
class _Routing:
    """Neurons shared [S] and per expert, the router, the experts of the calibration tokens, 0/1 [T, E]; where widths
    differ, the experts' loads [E] and what neurons are worth to them [E, F]."""

    shared_S: Tensor
    experts: tuple[Tensor, ...]
    router: Router
    chosen_TE: Tensor
    load_E: Tensor | None = None
    worth_EF: Tensor | None = None


@torch.no_grad()
def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Config, seed: int) -> LayerPlan:
    """Split one FFN; see :class:`moesaic.methods.base.MethodModule`. Holds 4 T F numbers (3 unless widths are
    free) of the calibration's dtype and 3 F^2 floats.

    Raises:
        InputError: no calibration tokens, outputs or energies with NaN or Inf, or experts that do not fit.
    """
    parts = config.sizes(weights.d_ff)
    if inputs is None or inputs.tokens == 0:
        raise InputError("token clusters need calibration inputs", "give calibration text")
    down_DF = weights.down_DF.float()
    x_TD = inputs.whole(torch.float32)
    h_TF, y_TD, share_TF = _activations(weights, inputs)
    check_finite(y_TD)
    check_finite(share_TF.sum(dim=1))  # squares may overflow where outputs do not
    stream_T = inputs.stream_T if config.token_weight == "stream" else None
    weight_T = stream_weights(y_TD, stream_T)
    scale_rows(share_TF, weight_T)
    if not parts.own:
        kept_F = _static_choice(share_TF, h_TF, down_DF, parts.shared)
        routing = _Routing(kept_F.nonzero().flatten(), (), STATIC, y_TD.new_zeros(len(y_TD), 0))
    elif config.split != "disjoint":
        allowed_F = None
        if parts.union is not None and parts.union < weights.d_ff:
            allowed_F = _static_choice(share_TF, h_TF, down_DF, parts.union)
            share_TF *= allowed_F
        routing = _overlapping(x_TD, share_TF, allowed_F, config, seed, inputs.team)
    else:
        routing = _disjoint(x_TD, share_TF, parts, config, seed)
    del share_TF
    plan = LayerPlan(
        d_ff=weights.d_ff,
        shared=routing.shared_S,
        experts=routing.experts if parts.varied else pad_experts(routing.experts),
        top_k=parts.top_k,
        router=routing.router,
        union=parts.union is not None,
        load=routing.load_E,
        worth=routing.worth_EF,
    )
    if config.refit == "none":
        return plan
    weight_T *= token_weights(y_TD)
    with rounded_products(h_TF.dtype == torch.bfloat16 and not _fewer_tokens(h_TF)):
        return replace(plan, readout=_readout(plan, down_DF, (h_TF, y_TD, weight_T), routing, config, inputs.team))


def _activations(weights: FFNWeights, inputs: SiteInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Activations [T, F] and outputs [T, D], without the output bias; energy shares [T, F].

    Outputs are float32, the others bfloat16 where calibration runs in it. A team's processes share out the tokens.
    """
    low = inputs.x_TD.dtype == torch.bfloat16
    work = weights.to(torch.bfloat16 if low else torch.float32)
    down_DF = work.down_DF.float()
    norm_F = down_DF.norm(dim=0)
    mine = inputs.part(inputs.team.part(inputs.tokens, BLOCK))
    h_TF, share_TF = (mine.empty(work.d_ff, work.up_FD.dtype) for _ in range(2))
    y_TD = down_DF.new_empty(mine.tokens, work.d_model)
    with rounded_products(low):
        for number, x_BD in enumerate(mine.batches(BLOCK, dtype=h_TF.dtype)):
            block = slice(number * BLOCK, (number + 1) * BLOCK)
            h_TF[block] = work.hidden(x_BD)
            h_BF = h_TF[block].float()
            y_TD[block] = h_BF @ down_DF.T
            share_TF[block] = neuron_shares(h_BF, norm_F)
    gather = partial(inputs.team.gather, count=inputs.tokens, block=BLOCK)
    return gather(h_TF), gather(y_TD), gather(share_TF)


def _static_choice(share_TF: Tensor, h_TF: Tensor, down_DF: Tensor, count: int) -> Tensor:
    """The same neurons for all tokens, bool [F]: of largest mean share, to which the share of all energy is added.
    Without that the neurons of a few tokens with massive activations would go, which no expert has then."""
    energy_F = mean_output_energy((h_BF.float() for h_BF in h_TF.split(BLOCK)), down_DF)
    score_F = mean_rows(share_TF) + (energy_F / energy_F.sum().clamp(min=1e-30)).float()
    return largest(score_F[None], count)[0]


def _overlapping(
    x_TD: Tensor, share_TF: Tensor, allowed_F: Tensor | None, config: Config, seed: int, team: Team
) -> _Routing:
    """``allowed_F``: the neurons that a smaller union has; the others have no shares."""
    parts = config.sizes(share_TF.shape[1])
    options: dict[str, Any] = {"rounds": config.rounds, "ridge": config.router_ridge}
    options |= {"seed": seed, "router_steps": config.router_steps, "team": team}
    if parts.varied:
        clusters = cluster_tokens_freely(x_TD, share_TF, len(parts.own), parts.own[0], allowed_F=allowed_F, **options)
    else:
        clusters = cluster_tokens(x_TD, share_TF, len(parts.own), (parts.shared, parts.own[0]), **options)
    experts = tuple(own_F.nonzero().flatten() for own_F in clusters.own_EF)
    routing = _routing(x_TD, clusters.shared_F.nonzero().flatten(), experts, clusters.router_ED, 1)
    return replace(routing, load_E=clusters.load_E, worth_EF=clusters.worth_EF)


def _disjoint(x_TD: Tensor, share_TF: Tensor, parts: FFNShape, config: Config, seed: int) -> _Routing:
    shared_F = largest(mean_rows(share_TF)[None], parts.shared)[0]
    rest_N = (~shared_F).nonzero().flatten()
    share_TN = share_TF[:, rest_N].float()
    rows_ND = predicted_patterns(x_TD, share_TN, config.router_ridge)
    clusters = balanced_kmeans(rows_ND, parts.own, rounds=config.rounds, seed=seed).members()
    energy_TE = torch.stack([share_TN[:, members].sum(dim=1) for members in clusters], dim=1)
    router_ED = fit_ridge([(x_TD, energy_targets(energy_TE, "amplitude"))], config.router_ridge)
    experts = tuple(rest_N[members] for members in clusters)
    return _routing(x_TD, shared_F.nonzero().flatten(), experts, router_ED, parts.top_k)


def _routing(x_TD: Tensor, shared_S: Tensor, experts: tuple[Tensor, ...], router_ED: Tensor, k: int) -> _Routing:
    chosen_TE = top_k_sets(x_TD @ router_ED.T, k)
    return _Routing(shared_S, experts, Router("linear", {"weight": router_ED}), chosen_TE)


def _readout(
    plan: LayerPlan,
    down_DF: Tensor,
    tokens: tuple[Tensor, Tensor, Tensor],
    routing: _Routing,
    config: Config,
    team: Team,
) -> Tensor:
    """The down projection of the stored neurons, float32 [D, P]; ``tokens`` are activations, outputs and weights."""
    h_TF, y_TD, w_T = tokens
    used = _used(h_TF, y_TD, w_T, routing)
    if _fewer_tokens(h_TF):
        used_TF = torch.cat([used_BF for used_BF, _, _ in used])
        common_DF = refit_few(down_DF, used_TF, y_TD, w_T, config.global_ridge)
    else:
        common_DF = refit(down_DF, used, config.global_ridge, team)
    if config.refit == "global" or config.split != "overlapping":
        packed_P = plan.packed.to(common_DF.device)
        return common_DF[:, packed_P.clamp(min=0)] * (packed_P >= 0)
    shared_DS = common_DF[:, routing.shared_S]
    parts = [shared_DS]
    for own_M, chosen_T in zip(routing.experts, routing.chosen_TE.T, strict=True):
        mine_C = chosen_T.nonzero().flatten()
        h_CF = h_TF[mine_C].float()
        wanted_CD = y_TD[mine_C] - h_CF[:, routing.shared_S] @ shared_DS.T
        parts.append(refit_few(common_DF[:, own_M], h_CF[:, own_M], wanted_CD, w_T[mine_C], config.expert_ridge))
    return torch.cat(parts, dim=1)


def _fewer_tokens(h_TF: Tensor) -> bool:
    """Whether the common refit is solved in the number of tokens: it then takes no matrix of F x F."""
    return h_TF.shape[0] < h_TF.shape[1]


def _used(h_TF: Tensor, y_TD: Tensor, w_T: Tensor, routing: _Routing) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of activations, float32, with zeros for the neurons that a token does not use; outputs and weights."""
    own_EF = h_TF.new_zeros(len(routing.experts), h_TF.shape[1])
    for own_F, members in zip(own_EF, routing.experts, strict=True):
        own_F[members] = 1
    tokens = (tensor.split(_BATCH) for tensor in (h_TF, routing.chosen_TE, y_TD, w_T))
    for h_BF, chosen_BE, y_BD, w_B in zip(*tokens, strict=True):
        used_BF = chosen_BE.to(own_EF.dtype) @ own_EF
        used_BF[:, routing.shared_S] = 1
        yield used_BF.mul_(h_BF).float(), y_BD, w_B
