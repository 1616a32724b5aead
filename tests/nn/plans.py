"""Plans that switch on every feature of a LayerPlan, for the tests of the runtime.

Axes: D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.blueprint.layer import LayerPlan, Router, WeightFade, single_neurons
from moesaic.blueprint.layout import Layout
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.low_bit import low_bit

ROUTERS = ("static", "linear", "linear_bias_normalised", "low_rank", "gated", "gated_biases", "gated_ungated")
EXTRAS = ("plain", "selection_bias", "changed_weights")


def random_partition(weights: FFNWeights, layout: str, seed: int = 0) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Shared neurons and experts of a random balanced partition, padded with -1 to equal width."""
    split = Layout.parse(layout)
    order_F = torch.randperm(weights.d_ff, generator=torch.Generator().manual_seed(seed))
    shared, routed = order_F.tensor_split([split.shared_size(weights.d_ff)])
    sizes = split.expert_sizes(weights.d_ff)
    parts = routed.split(sizes) if sizes else ()
    return shared, tuple(torch.nn.functional.pad(part, (0, max(sizes) - len(part)), value=-1) for part in parts)


def random_router(kind: str, experts: int, d_model: int, seed: int = 0) -> Router:
    """A router of one of the ``ROUTERS`` with Gaussian tensors."""
    generator = torch.Generator().manual_seed(seed + 1000)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    matrices = {name: draw(experts, d_model) for name in ("weight", "gate", "up")}
    biases = {name: draw(experts) for name in ("bias", "gate_bias", "up_bias")}
    every = matrices | biases
    if kind == "low_rank":
        return Router("low_rank", {"reduce": draw(3, d_model), "weight": draw(experts, 3), "bias": draw(experts)})
    names = {
        "static": (),
        "linear": ("weight",),
        "linear_bias_normalised": ("weight", "bias"),
        "gated": ("gate", "up"),
        "gated_biases": ("gate", "up", "gate_bias", "up_bias"),
        "gated_ungated": ("up", "up_bias"),
    }[kind]
    return Router(kind.partition("_")[0], {name: every[name] for name in names}, kind.endswith("normalised"))  # type: ignore[arg-type]


def random_plan(
    weights: FFNWeights,
    layout: str = "S2A2E8",
    router: str = "linear",
    gate: str = "uniform",
    extra: str = "plain",
    seed: int = 0,
) -> LayerPlan:
    """A plan with a random partition, one of ``ROUTERS``, one gate and one of ``EXTRAS``."""
    shared, experts = random_partition(weights, layout, seed)
    count, d_model = len(experts), weights.d_model
    generator = torch.Generator().manual_seed(seed + 2000)
    changed = extra == "changed_weights"
    rows = len(shared) + sum(map(len, experts))
    read = {name: t for name, t in weights.tensors().items() if not name.startswith("down")} if changed else {}
    projections = {name: torch.randn(rows, *t.shape[1:], generator=generator) for name, t in read.items()}
    return LayerPlan(
        d_ff=weights.d_ff,
        shared=shared,
        experts=experts,
        top_k=count if router == "static" else Layout.parse(layout).active,
        router=random_router(router, count, d_model, seed),
        gate=gate,  # type: ignore[arg-type]
        selection_bias=0.3 * torch.randn(count, generator=generator) if extra == "selection_bias" else None,
        gate_scale=torch.randn(count, generator=generator) if gate == "scaled" else None,
        fade=WeightFade(tuple(0.1 * e / max(count, 1) for e in range(count)), "row") if changed else None,
        expert_scale=1 + 0.1 * torch.randn(count, d_model, generator=generator) if changed else None,
        readout=torch.randn(d_model, len(shared) + sum(map(len, experts)), generator=generator) if changed else None,
        bias=torch.randn(d_model, generator=generator) if changed else None,
        projections=projections,
    )


def plan_of(member_EF: Tensor, shared: Tensor | None = None, top_k: int = 1, **fields: Any) -> LayerPlan:
    """A plan whose experts are the rows of a table, padded to one width, with a random linear router."""
    experts = [row_F.nonzero().flatten() for row_F in member_EF]
    width = max(1, *(len(expert) for expert in experts))
    padded = tuple(F.pad(expert, (0, width - len(expert)), value=-1) for expert in experts)
    generator = torch.Generator().manual_seed(0)
    router = Router("linear", {"weight": torch.randn(len(experts), 16, generator=generator)})
    shared = torch.arange(0) if shared is None else shared
    return LayerPlan(member_EF.shape[1], shared, padded, top_k, router, **fields)


def random_members(experts: int, neurons: int, share: float, seed: int = 0) -> Tensor:
    """A table of memberships, each neuron in each expert with probability ``share``."""
    return torch.rand(experts, neurons, generator=torch.Generator().manual_seed(seed)) < share


def neuron_plan(
    weights: FFNWeights,
    bits: int = 4,
    group: int = 32,
    active: float = 0.5,
    threshold: float | None = None,
    readout: bool = False,
    int8: bool = False,
) -> LayerPlan:
    """Every neuron an expert under a low-bit router, which in int8 is the weights' high half."""
    tensors = {"norm": weights.down_DF.float().norm(dim=0)}
    group = 64 if int8 else group
    for part, matrix_FD in (("up", weights.up_FD), ("gate", weights.gate_FD)):
        if matrix_FD is not None and not int8:
            made = low_bit(matrix_FD, bits, group)
            tensors |= dict(zip((f"{part}_codes", f"{part}_scale", f"{part}_offset"), made, strict=True))
    if threshold is not None:
        tensors["threshold"] = torch.tensor([threshold])
    generator = torch.Generator().manual_seed(3)
    return LayerPlan(
        weights.d_ff,
        torch.arange(0),
        single_neurons(weights.d_ff),
        round(active * weights.d_ff),
        Router("low_bit", tensors, bits=bits, group=group),
        readout=torch.randn(weights.down_DF.shape, generator=generator) if readout else None,
        int8=int8,
    )


def as_union(plan: LayerPlan) -> LayerPlan:
    """The same plan stored once."""
    return replace(plan, union=True)


def unpadded(plan: LayerPlan) -> LayerPlan:
    """The union with experts of their own widths."""
    experts = tuple(expert[expert >= 0] for expert in plan.experts)
    return replace(plan, experts=experts, union=True)
