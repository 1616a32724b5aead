"""What the routed methods and the controls share: cutting into units, equal widths, the plan of disjoint experts.

Axes: F neurons of the dense FFN, S shared neurons, E routed experts, M neurons per expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.blueprint.layer import STATIC, LayerPlan, Router
from moesaic.blueprint.layout import Layout
from moesaic.blueprint.shape import GateKind


def split_units(order_F: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
    """Cut an order of the neurons into the shared part and the experts: consecutive units, sizes as the layout says."""
    d_ff = len(order_F)
    shared, *experts = order_F.split([layout.shared_size(d_ff), *layout.expert_sizes(d_ff)])
    return shared, experts


def pad_experts(experts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Experts of one width: shorter ones end in -1, the neuron of zeros."""
    width = max((len(expert) for expert in experts), default=0)
    return tuple(torch.nn.functional.pad(expert, (0, width - len(expert)), value=-1) for expert in experts)


def routed_plan(
    d_ff: int,
    layout: Layout,
    shared: Tensor,
    experts: Sequence[Tensor],
    router: Router,
    gate: GateKind = "uniform",
) -> LayerPlan:
    """The plan of a disjoint split, ``layout.active`` experts per token; without experts the router is static."""
    return LayerPlan(
        d_ff=d_ff,
        shared=shared,
        experts=pad_experts(experts),
        top_k=layout.active,
        router=router if layout.routed else STATIC,
        gate=gate,
    )
