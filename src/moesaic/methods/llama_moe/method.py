"""LLaMA-MoE (arXiv 2406.16554 and 2411.15708): disjoint random or contiguous experts, without their training.

Equations: the neurons, in random or storage order, are cut into equal units; the first x units are shared and ungated.
Router z = W x, TopK the k experts of largest z, weights g_i = 1/k (uniform) or the softmax of z over TopK:

    y = E_shared(x) + s sum_{i in TopK} g_i E_i(x)

The papers' score scale is s = E / k. Our default s = k [OURS] makes uniform weights exactly 1, so that all experts on
equals dense. Both papers train the result for billions of tokens; untrained, as it leaves here, it is a poor model.

Axes: T tokens, D model width, F neurons, E routed experts, K active.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.blueprint.layout import Layout
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.methods.llama_moe.config import Config
from moesaic.methods.routed import routed_plan, split_units
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.kmeans import balanced_kmeans


def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Config, seed: int) -> LayerPlan:
    """Split and initialise the router; see :class:`moesaic.methods.base.MethodModule`.

    Raises InputError when ``router=centroids`` has fewer inputs than experts.
    """
    layout = Layout.parse(config.layout)
    generator = torch.Generator().manual_seed(seed)
    random_order = config.split == "random"
    order_F = torch.randperm(weights.d_ff, generator=generator) if random_order else torch.arange(weights.d_ff)
    shared, experts = split_units(order_F, layout)
    if config.router == "kaiming":
        # nn.Linear's Kaiming-uniform default: bound 1 / sqrt(fan in)
        router_ED = (2 * torch.rand(layout.routed, weights.d_model, generator=generator) - 1) / weights.d_model**0.5
    elif inputs is None or inputs.tokens < layout.routed:
        raise InputError(
            "router=centroids needs at least one token per expert", "give more text, or use router=kaiming"
        )
    else:
        router_ED = _input_centroids(inputs, layout.routed, config, seed)
    gate = config.gate if layout.routed else "uniform"
    plan = routed_plan(weights.d_ff, layout, shared, experts, Router("linear", {"weight": router_ED}), gate)
    if config.score_scale is None or layout.routed == 0 or config.score_scale == layout.active:
        return plan
    return replace(plan, expert_scale=torch.full((layout.routed,), config.score_scale / layout.active))


def _input_centroids(inputs: SiteInputs, experts: int, config: Config, seed: int) -> Tensor:
    """Centres of equal clusters of the FFN inputs, float32 [E, D]."""
    if experts == 0:
        return torch.zeros(0, inputs.x_TD.shape[1])
    tokens = min(inputs.tokens, max(config.router_tokens, experts))
    picked_T = torch.arange(tokens) * inputs.tokens // tokens
    size, longer = divmod(tokens, experts)
    sizes = [size + 1] * longer + [size] * (experts - longer)
    picked_TD = inputs.x_TD[picked_T].to(inputs.device)
    return balanced_kmeans(picked_TD, sizes, rounds=config.rounds, seed=seed).centroids_ED
