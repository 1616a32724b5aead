"""MLPMoE (Novikov, arXiv 2511.21089): slice the dense FFN into N branches that are always on, and add them up.

Equations, for any partition I_1..I_N of the neurons (exact, since act and * are elementwise; b_d counts once):

    E_i(x) = W_d[:, I_i] (act(W_g[I_i] x + b_g[I_i]) * (W_u[I_i] x + b_u[I_i])),    FFN(x) = sum_i E_i(x) + b_d

No router, no data, no training. Two ways to remove something, alone or together:

* Fractal Fade: branch i loses the fraction s_i of its weights (smallest magnitudes) or of its neurons (lowest scores);
* Compensated Pruning: FFN'(x) = c sum_{i in K} E_i(x) + b_d, with c folded into W_d.

Only the abstract of the paper was at hand: slicing defaults and both removals are our readings [OURS]. Limits and
choices: docs/methods/mlpmoe.md.

Axes: T tokens, D model width, F neurons, N branches, K kept branches, M neurons of a branch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan, WeightFade
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.methods.mlpmoe.config import Config, prunes
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.compensation import (
    channel_compensation,
    compensation,
    kept_branches,
    least_squares_factor,
)
from moesaic.solvers.energy import branch_energies, neuron_norms, neuron_scores, square_norms
from moesaic.solvers.fade import fade_fractions
from moesaic.solvers.magnitude import fade_branch


def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Config, seed: int) -> LayerPlan:
    """Slice, fade, prune; see :class:`moesaic.methods.base.MethodModule`. ``seed`` matters for prune_which=random only.

    Fade and prune together: s_i belongs to branch i of all N; which branches go and c are decided on the dense slices.
    """
    config.check(weights.d_ff)
    norms_F = neuron_norms(weights.gate_FD, weights.up_FD, weights.down_DF) if _reads_norms(config) else None
    slices = _slices(weights, config, norms_F)
    experts, fade = slices, None
    if config.fade_max > 0:
        fractions = fade_fractions(
            config.fade_schedule, config.branches, config.fade_min, config.fade_max, config.fade_gamma
        )
        if config.fade_unit == "weight":
            fade = WeightFade(fractions, config.fade_scope)
        else:
            assert norms_F is not None
            experts = _fade_neurons(slices, fractions, neuron_scores(*norms_F))
    plan = _static_plan(weights.d_ff, experts, fade)
    return _prune(weights, inputs, plan, slices, norms_F, config, seed) if prunes(config) else plan


def _reads_norms(config: Config) -> bool:
    fades_neurons = config.fade_max > 0 and config.fade_unit == "neuron"
    return config.order == "norm-sorted" or fades_neurons or prunes(config)


def _slices(weights: FFNWeights, config: Config, norms_F: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    """The partition: N index sets; where N does not divide f, the first f mod N are one longer."""
    d_ff = weights.d_ff
    order_F = torch.arange(d_ff, device=weights.up_FD.device)
    if config.order == "strided":
        return tuple(order_F[start :: config.branches] for start in range(config.branches))
    if config.order == "norm-sorted":
        assert norms_F is not None
        order_F = torch.argsort(neuron_scores(*norms_F), descending=True, stable=True)
    size, longer = divmod(d_ff, config.branches)
    return order_F.split([size + 1] * longer + [size] * (config.branches - longer))


def _static_plan(d_ff: int, experts: tuple[Tensor, ...], fade: WeightFade | None) -> LayerPlan:
    return LayerPlan(d_ff=d_ff, shared=torch.zeros(0, dtype=torch.long), experts=experts, top_k=len(experts), fade=fade)


def _fade_neurons(slices: tuple[Tensor, ...], fractions: tuple[float, ...], score_F: Tensor) -> tuple[Tensor, ...]:
    """Each branch without its floor(s_i |I_i|) neurons of lowest score (of equal scores the earlier go), order kept."""
    experts = []
    for index_M, fraction in zip(slices, fractions, strict=True):
        removed = math.floor(fraction * len(index_M))
        kept = torch.argsort(score_F[index_M], stable=True)[removed:].sort().values
        experts.append(index_M[kept])
    return tuple(experts)


def _prune(
    weights: FFNWeights,
    inputs: SiteInputs | None,
    plan: LayerPlan,
    slices: tuple[Tensor, ...],
    norms_F: tuple[Tensor, Tensor] | None,
    config: Config,
    seed: int,
) -> LayerPlan:
    """Keep K branches of ``plan`` and fold c into them; energies are those of the dense ``slices``."""
    assert norms_F is not None
    assert config.keep is not None
    energies_N = branch_energies(*norms_F, slices)
    kept = kept_branches(config.prune_which, energies_N, config.keep, torch.Generator().manual_seed(seed))
    fade = plan.fade
    if fade is not None:
        fade = replace(fade, fractions=tuple(fade.fractions[i] for i in kept))
    pruned = _static_plan(plan.d_ff, tuple(plan.experts[i] for i in kept), fade)
    if config.prune_factor == "per_channel":
        kept_D = square_norms(weights.down_DF[:, torch.cat([slices[i] for i in kept])])
        c_D = channel_compensation(square_norms(weights.down_DF), kept_D, config.prune_clip)
        return replace(pruned, expert_scale=c_D.float().repeat(config.keep, 1))
    if config.prune_factor == "oracle":
        c = _oracle_factor(weights, inputs, pruned)
    else:
        c = compensation(config.prune_factor, energies_N, kept, config.prune_clip)
    return pruned if c == 1.0 else replace(pruned, expert_scale=torch.full((config.keep,), c))


def _oracle_factor(weights: FFNWeights, inputs: SiteInputs | None, plan: LayerPlan) -> float:
    if inputs is None or inputs.tokens == 0:
        raise InputError(
            "prune_factor=oracle needs calibration inputs", "give calibration text, or use prune_factor=sqrt"
        )
    # b_d is in both outputs unscaled, so it is left out of the fit
    dense = replace(weights, down_bias_D=None).to(torch.float32)
    branches = [branch.to(torch.float32) for branch in _branches(weights, plan)]
    return least_squares_factor(
        (dense(x_TD), torch.stack([branch(x_TD) for branch in branches]).sum(dim=0))
        for x_TD in inputs.batches(dtype=torch.float32)
    )


def _branches(weights: FFNWeights, plan: LayerPlan) -> Iterator[FFNWeights]:
    """The branches of a plan, faded, without c and without b_d."""
    for i, index_M in enumerate(plan.experts):
        branch = weights.take(index_M.to(weights.up_FD.device))
        if plan.fade is not None:
            fraction, scope = plan.fade.fractions[i], plan.fade.scope
            gate, up, down = fade_branch(branch.gate_FD, branch.up_FD, branch.down_DF, fraction, scope)
            branch = replace(branch, gate_FD=gate, up_FD=up, down_DF=down)
        yield branch
