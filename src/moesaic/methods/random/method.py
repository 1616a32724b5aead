"""Control: a random balanced partition behind a random linear router. What any method must beat.

Source: ours [OURS]. A random permutation of the neurons is cut into units; the router is z = W x with W_ed ~ N(0, 1/D);
a chosen expert counts with weight 1. Needs no data.

Axes: D model width, F neurons, E routed experts.
"""

from __future__ import annotations

import torch

from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.calibration.inputs import SiteInputs
from moesaic.methods.random.config import Config, resolve_layout
from moesaic.methods.routed import routed_plan, split_units
from moesaic.nn.ffn import FFNWeights


def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Config, seed: int) -> LayerPlan:
    """A random split; see :class:`moesaic.methods.base.MethodModule`. The same seed gives the same split."""
    layout = resolve_layout(config, weights.d_ff)
    generator = torch.Generator().manual_seed(seed)
    shared, experts = split_units(torch.randperm(weights.d_ff, generator=generator), layout)
    router_ED = torch.randn(layout.routed, weights.d_model, generator=generator) / weights.d_model**0.5
    return routed_plan(weights.d_ff, layout, shared, experts, Router("linear", {"weight": router_ED}))
