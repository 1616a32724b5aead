"""Tiny split models for the tests of targets: plans, written folders, and logits of both sides.

Axes: B batch of one, W tokens, V vocabulary, T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.anatomy import FAMILIES, read_anatomy
from moesaic.blueprint.attention import AttentionPlan
from moesaic.blueprint.layer import STATIC, LayerPlan, Router
from moesaic.blueprint.layout import Layout
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.jobs.export_gguf import export_gguf
from moesaic.methods.routed import pad_experts, split_units
from moesaic.nn.reference import choose, reference_ffn
from moesaic.progress import Silent
from moesaic.staging.writer import StagedOutput
from moesaic.targets import get_target
from moesaic.targets.base import Split, TargetOptions
from moesaic.targets.write import DenseSource, provenance_of, read_split, write_model, write_side_files

write_gguf = partial(export_gguf, check=False)
"""Without the checks at its end: these tests compare by themselves."""
IDS = torch.arange(24)[None] * 11 % 290 + 4


def plan_of(
    d_ff: int, d_model: int, layout: str = "S2A2E6", *, router: str = "linear", seed: int = 0, **fields: Any
) -> LayerPlan:
    """A random partition; router ``linear`` or ``static``, further fields of the plan as given."""
    shape = Layout.parse(layout)
    generator = torch.Generator().manual_seed(seed)
    shared, experts = split_units(torch.randperm(d_ff, generator=generator), shape)
    rows_ED = torch.randn(shape.routed, d_model, generator=generator) / d_model**0.5
    made = STATIC if router == "static" else Router("linear", {"weight": rows_ED})
    top_k = shape.routed if router == "static" else shape.active
    return LayerPlan(d_ff, shared, pad_experts(experts), top_k, made, **fields)


def plans_for(folder: Path, layout: str = "S2A2E6", **fields: Any) -> dict[str, LayerPlan]:
    """A plan for every FFN of a tiny model, another one per layer."""
    checkpoint = Checkpoint(folder)
    anatomy = read_anatomy(checkpoint.config, hierarchical=FAMILIES[checkpoint.config["model_type"]].moe is not None)
    return {
        site.path: plan_of(site.d_ff, anatomy.d_model, layout, seed=seed, **fields)
        for seed, site in enumerate(anatomy.sites)
    }


def split_for(folder: Path, plans: Mapping[str, LayerPlan]) -> Split:
    """What targets are shown of a tiny model."""
    checkpoint = Checkpoint(folder)
    hierarchical = FAMILIES[checkpoint.config["model_type"]].moe is not None
    return read_split(checkpoint, read_anatomy(checkpoint.config, hierarchical=hierarchical), plans)


def write(
    folder: Path,
    plans: Mapping[str, LayerPlan],
    out: Path,
    target: str,
    options: TargetOptions | None = None,
    attention: Mapping[str, AttentionPlan] = MappingProxyType({}),
) -> Path:
    """Write ``folder`` under ``plans`` as a target architecture, as a conversion does."""
    checkpoint = Checkpoint(folder)
    anatomy = read_anatomy(checkpoint.config)
    made, options = get_target(target), options or TargetOptions()
    split = read_split(checkpoint, anatomy, plans, attention)
    blueprint = Blueprint(anatomy.family.name, checkpoint.fingerprint(), "test", {}, dict(plans), dict(attention))
    with StagedOutput.open(out, {"test": target}, source=folder) as staged:
        write_model(DenseSource(checkpoint, split), split, made, options, staged, Silent())
        write_side_files(checkpoint, staged, split, blueprint, provenance_of(checkpoint, blueprint, {}), made, options)
        return staged.finish()


@dataclass(frozen=True)
class Run:
    """One forward: logits_WV, and per routed layer the set of experts of each token."""

    logits_WV: Tensor
    chosen: list[list[frozenset[int]]]


@torch.inference_mode()
def run_stock(folder: Path, ids_BW: Tensor = IDS, **config: Any) -> Run:
    """The folder in stock transformers, fp32. Asserts that its tensors are exactly those of the architecture."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **config
    )
    assert {key: names for key, names in info.items() if names} == {}
    chosen: list[list[frozenset[int]]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        chosen.append([frozenset(row) for row in output[-1].tolist()])

    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(keep)
    return Run(model.eval()(ids_BW).logits[0], chosen)


class ReferenceFFN(nn.Module):
    """A dense FFN split by its plan, computed by the oracle."""

    def __init__(self, weights: Any, plan: LayerPlan, chosen: list[list[frozenset[int]]]) -> None:
        super().__init__()
        self.weights, self.plan, self.chosen = weights, plan, chosen

    def forward(self, x_BWD: Tensor) -> Tensor:
        x_TD = x_BWD.reshape(-1, x_BWD.shape[-1])
        if self.plan.experts:
            self.chosen.append([frozenset(e for e, _ in choose(self.weights, self.plan, x_D)) for x_D in x_TD])
        return reference_ffn(self.weights, self.plan, x_TD).view(x_BWD.shape)


@torch.inference_mode()
def run_reference(folder: Path, plans: Mapping[str, LayerPlan], ids_BW: Tensor = IDS) -> Run:
    """The dense model in stock transformers with its FFNs computed by the oracle."""
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(folder)
    anatomy = read_anatomy(checkpoint.config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chosen: list[list[frozenset[int]]] = []
    for site in anatomy.sites:
        if site.path in plans:
            weights = load_ffn(checkpoint, site, anatomy.activation)
            model.set_submodule(site.path, ReferenceFFN(weights, plans[site.path], chosen))
            for sibling in anatomy.family.bypass:
                model.set_submodule(f"{anatomy.layer_path(site.layer)}.{sibling}", nn.Identity())
    return Run(model.eval()(ids_BW).logits[0], chosen)


def relative(actual: Run, expected: Run) -> float:
    """Largest |logit difference| over the largest |logit|."""
    difference = (actual.logits_WV - expected.logits_WV).abs().max()
    return (difference / expected.logits_WV.abs().max()).item()
