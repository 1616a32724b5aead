"""Token clusters: overlapping experts for groups of tokens that a linear router can tell apart, and refitted readouts.

Source: ours [OURS]; docs/methods/token_clusters.md says why. For an FFN of F neurons, x the calibration inputs:

1. Energy share of neuron i for token t: q_ti = (h_ti |W_d[:, i]|)^2 / sum_j (h_tj |W_d[:, j]|)^2.
2. Experts: E overlapping sets of M neurons, and a linear router, by alternation (:mod:`moesaic.solvers.token_clusters`).
   One expert per token, with weight 1.
3. Readout: least squares for the down projection on the tokens as they are routed, each of weight 1 / |y|^2: first one
   matrix for all experts, shrunk to W_d; then each expert's own, shrunk to that one (:mod:`moesaic.solvers.refit`).

Neurons that are shared by all experts are stored once and keep the common readout.

Axes: T tokens, D model width, F neurons, S shared neurons, E experts, M neurons per expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.blueprint import STATIC, LayerPlan, Router
from moesaic.errors import InputError
from moesaic.methods.base import SiteInputs
from moesaic.methods.token_clusters.config import Config, widths
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.refit import refit, refit_few, token_weights
from moesaic.solvers.token_clusters import TokenClusters, assign, cluster_tokens, energy_share, largest

_BATCH = 2048


@torch.no_grad()
def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Config, seed: int) -> LayerPlan:
    """Split one FFN; see :class:`moesaic.methods.base.MethodModule`. Holds 2 T F floats.

    Raises:
        InputError: no calibration tokens, or ``max_params`` too small.
    """
    width, shared = widths(config, weights.d_ff)
    if inputs is None or inputs.tokens == 0:
        raise InputError("token clusters need calibration inputs", "give calibration text")
    work = weights.to(torch.float32)
    x_TD = torch.cat(list(inputs.batches(dtype=torch.float32)))
    h_TF = torch.cat([work.hidden(x_BD) for x_BD in x_TD.split(_BATCH)])
    share_TF = energy_share(h_TF, work.down_DF.norm(dim=0))
    if config.experts == 1:
        clusters = _static(share_TF, width)
        router, experts = STATIC, ()
        assigned_T = torch.zeros(len(x_TD), dtype=torch.int64)
    else:
        clusters = cluster_tokens(
            x_TD, share_TF, config.experts, width, shared, rounds=config.rounds, ridge=config.router_ridge, seed=seed
        )
        router = Router("linear", {"weight": clusters.router_ED})
        experts = tuple((own_F & ~clusters.shared_F).nonzero().flatten() for own_F in clusters.member_EF)
        assigned_T = assign(x_TD, clusters.router_ED)
    del share_TF
    shared_S = clusters.shared_F.nonzero().flatten()
    readout = None
    if config.refit != "none":
        readout = fit_readout(work.down_DF, h_TF, clusters.member_EF, assigned_T, (shared_S, experts), config)
    return LayerPlan(
        d_ff=weights.d_ff,
        shared=shared_S,
        experts=experts,
        top_k=min(1, len(experts)),
        router=router,
        readout=readout,
    )


def fit_readout(
    down_DF: Tensor,
    h_TF: Tensor,
    member_EF: Tensor,
    assigned_T: Tensor,
    stored: tuple[Tensor, tuple[Tensor, ...]],
    config: Config,
) -> Tensor:
    """The down projection of the stored neurons [shared; expert 0; ...], float32 [D, S + E M].

    Args:
        down_DF: Of the dense FFN, float32.
        h_TF: Activations of the dense FFN, float32; masked in place.
        member_EF: Neurons that a token of each expert uses, bool.
        assigned_T: Expert of every token.
        stored: Shared neurons and the experts' own.
        config: Which refit, how strongly shrunk.
    """
    y_TD = torch.cat([h_BF @ down_DF.T for h_BF in h_TF.split(_BATCH)])
    w_T = token_weights(y_TD)
    for h_BF, assigned_B in zip(h_TF.split(_BATCH), assigned_T.split(_BATCH), strict=True):
        h_BF.mul_(member_EF[assigned_B])

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return zip(h_TF.split(_BATCH), y_TD.split(_BATCH), w_T.split(_BATCH), strict=True)

    common_DF = refit(down_DF, batches(), config.global_ridge)
    shared_S, experts = stored
    parts = [common_DF[:, shared_S]]
    for expert, own_M in enumerate(experts):
        readout_DM = common_DF[:, own_M]
        if config.refit == "expert":
            mine_T = (assigned_T == expert).nonzero().flatten()
            h_CF = h_TF[mine_T]
            wanted_CD = y_TD[mine_T] - h_CF[:, shared_S] @ parts[0].T
            readout_DM = refit_few(readout_DM, h_CF[:, own_M], wanted_CD, w_T[mine_T], config.expert_ridge)
        parts.append(readout_DM)
    return torch.cat(parts, dim=1)


def _static(share_TF: Tensor, width: int) -> TokenClusters:
    """The neurons of largest mean share, for all tokens."""
    mean_F = share_TF.mean(dim=0)
    kept_F = largest(mean_F[None], width)[0]
    kept = float(mean_F[kept_F].sum())
    return TokenClusters(kept_F[None], kept_F, torch.zeros(1, 0), kept, kept)
