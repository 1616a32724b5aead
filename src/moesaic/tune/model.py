"""The converted model, ready to be trained, and back to tensors afterwards.

Axes: D model width, E routed experts.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.anatomy.base import Anatomy
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError
from moesaic.materialise.apply import apply_blueprint
from moesaic.nn.modeling_moesaic import MoEFeedForward
from moesaic.train.data import derived_seed
from moesaic.tune.config import LoRAOptions, TuneConfig

ADAPTER = "tune"
_ATTENTION = (".self_attn.", ".attn.", ".attention.")
_BIAS_SLOPE = 0.25  # of the sigmoid at 0: sigmoid(z + b) ranks like sigmoid(z) + b / 4 while both are small


@dataclass(frozen=True)
class Student:
    """A converted model with what is to be trained: adapters that change nothing yet, routers, scales.

    ``routing_rates``: learning rates of routers and scales, by parameter name.
    """

    model: nn.Module
    routing_rates: dict[str, float]


def make_student(
    source: Checkpoint,
    dense: Checkpoint | None,
    blueprint: Blueprint,
    anatomy: Anatomy,
    config: TuneConfig,
    gate_ids_NW: Tensor | None,
) -> Student:
    """The converted model, prepared for training; equal arguments give equal weights.

    ``gate_ids_NW``: text on which new sigmoid gates are scaled; None keeps the gates.
    """
    model = load_converted(source, dense, blueprint, anatomy)
    if gate_ids_NW is not None:
        open_gates(model, blueprint.sites, gate_ids_NW, config.gate_spread)
    if config.lora is not None:  # first: peft freezes all else
        add_adapters(model, anatomy, blueprint.sites, config.lora, config.train.seed)
    rates = unfreeze_routing(model, blueprint.sites, config)
    if config.lora is None and not rates:
        raise InputError(
            "nothing is trained: no router of this model gets a gradient", "set gate to sigmoid, scale_rate, or lora"
        )
    return Student(model, rates)


def load_dense(dense: Checkpoint) -> nn.Module:
    """The dense model, fp32, frozen."""
    return load_model(dense.folder, torch.float32).requires_grad_(False)


def load_converted(source: Checkpoint, dense: Checkpoint | None, blueprint: Blueprint, anatomy: Anatomy) -> nn.Module:
    """The converted model in our runtime, fp32, frozen.

    A folder of the ``moesaic`` architecture is loaded as it is. The model of a stock folder is made again from
    ``dense`` and the blueprint; its FFNs are packed as they are stored, as when the folder was written.
    """

    if source.config.get("model_type") == "moesaic":
        model: Any = load_model(source.folder, torch.float32)
    else:
        assert dense is not None
        model = load_model(dense.folder, torch.float32)
        apply_blueprint(model, blueprint, anatomy, dense)
    return model.float().requires_grad_(False).eval()


def sites_of(model: nn.Module, paths: Mapping[str, LayerPlan]) -> Iterator[tuple[str, MoEFeedForward]]:
    """The converted FFNs by their module paths."""
    for path in paths:
        module = model.get_submodule(path)
        assert isinstance(module, MoEFeedForward)
        yield path, module


@torch.no_grad()
def open_gates(model: nn.Module, plans: Mapping[str, LayerPlan], ids_NW: Tensor, spread: float) -> None:
    """Turn weights of 1 into 2 sigmoid(z) close to 1, where routers are linear; the choice of experts stays.

    The scores, without the router's bias, are scaled so that their root mean square on ``ids_NW`` is ``spread``. The
    bias becomes a selection bias, which ranks alike to first order in the spread.
    """
    size: dict[str, float] = {}
    modules = {path: ffn for path, ffn in sites_of(model, plans) if can_open(plans[path])}
    handles = []
    for path, ffn in modules.items():
        assert ffn.router is not None

        def note(module: nn.Module, inputs: Any, z_TE: Tensor, path: str = path) -> None:
            bias_E: Tensor | None = module.bias  # type: ignore[assignment]
            size[path] = float((z_TE if bias_E is None else z_TE - bias_E).square().mean().sqrt())

        handles.append(ffn.router.register_forward_hook(note))
    model(input_ids=ids_NW, use_cache=False)
    for handle in handles:
        handle.remove()
    usual = statistics.median(size.values()) if size else 1.0  # an existing MoE's expert may get no token
    for path, ffn in modules.items():
        router = ffn.router
        assert router is not None
        scale = spread / max(size.get(path, usual), 1e-12)
        router.weight.mul_(scale)
        ffn.gate = "sigmoid"
        if router.bias is not None:
            ffn.selection_bias = router.bias.detach() * (scale * _BIAS_SLOPE)
            router.bias = None


def routes(plan: LayerPlan) -> bool:
    """Whether there is a choice of experts to train."""
    return plan.router.kind != "static" and plan.top_k < len(plan.experts)


def can_open(plan: LayerPlan) -> bool:
    """Whether :func:`open_gates` can give this FFN a sigmoid gate: weights of 1 by a linear router."""
    return routes(plan) and plan.router.kind == "linear" and plan.gate == "uniform" and plan.selection_bias is None


def add_adapters(
    model: nn.Module, anatomy: Anatomy, plans: Mapping[str, LayerPlan], lora: LoRAOptions, seed: int
) -> int:
    """Put peft's LoRA around the projections, fp32, equal for equal seeds; returns how many. B starts at zero."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("low-rank training needs peft", "pip install 'moesaic[tune]'") from error

    names = list(target_names(model, anatomy, plans, lora))
    if not names:
        raise InputError("no matrix to train: none of the targets is there", "set lora.targets, or lora to null")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=names,
        bias="none",  # type: ignore[arg-type]
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # GPT-2 has both kinds; peft finds out by itself
        torch.manual_seed(derived_seed(seed, 1))
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return len(names)


def target_names(
    model: nn.Module, anatomy: Anatomy, plans: Mapping[str, LayerPlan], lora: LoRAOptions
) -> Iterator[str]:
    """Module paths of the matrices that get low-rank changes."""
    from transformers.pytorch_utils import Conv1D

    layers = tuple(f"{anatomy.layer_path(layer)}." for layer in range(anatomy.num_layers))
    own = tuple(f"{path}." for path in plans)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or not name.startswith(layers):
            continue
        if name.startswith(own):
            if "experts" in lora.targets and name.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj"):
                yield name
        elif "attention" in lora.targets and any(part in name for part in _ATTENTION):
            yield name


def make_frozen_small(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen matrices in ``dtype``, in which they are multiplied: no cast per step. Embeddings and norms stay."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and id(module.weight) not in embeddings:
            module.weight.data = module.weight.data.to(dtype)


def unfreeze_routing(model: nn.Module, plans: Mapping[str, LayerPlan], config: TuneConfig) -> dict[str, float]:
    """Let routers and expert scales train; returns the learning rate of each, by parameter name.

    A router's scale is free (a temperature folded into it), so its rate is relative to its size. With ``balance`` there
    is a selection bias to move.
    """
    rates: dict[str, float] = {}
    for path, ffn in sites_of(model, plans):
        if ffn.router is None or ffn.top_k == ffn.experts:
            continue
        if config.balance and ffn.gate != "uniform" and ffn.selection_bias is None:
            ffn.selection_bias = torch.zeros(ffn.experts)
        if config.router_rate and (ffn.gate in ("sigmoid", "softmax_topk") or _scaled(ffn, config)):
            for name, parameter in ffn.router.named_parameters():
                rms = float(parameter.detach().square().mean().sqrt())
                rates[f"{path}.router.{name}"] = config.router_rate * max(rms, 1e-6)
                parameter.requires_grad_()
        if config.scale_rate and ffn.gate_scale is not None:
            rates[f"{path}.gate_scale"] = config.scale_rate
            ffn.gate_scale.requires_grad_()
    return rates


def _scaled(ffn: MoEFeedForward, config: TuneConfig) -> bool:
    """Whether the scaled gate lets gradients to its router: with scales of zero that stay, none would come."""
    return ffn.gate_scale is not None and (config.scale_rate > 0 or bool(ffn.gate_scale.any()))


@torch.no_grad()
def merge_adapters(model: nn.Module) -> list[str]:
    """Add B A to the matrices and take the wrappers off; returns the module paths of what has changed."""
    changed = []
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            module.merge()  # type: ignore[operator]
            model.set_submodule(name, module.get_base_layer())  # type: ignore[operator]
            changed.append(name)
    return changed


def tuned_blueprint(blueprint: Blueprint, model: nn.Module) -> Blueprint:
    """The blueprint with routers, gates, scales and biases as they are in the model now."""
    sites = {}
    for path, ffn in sites_of(model, blueprint.sites):
        plan = blueprint.sites[path]
        if ffn.router is not None:
            tensors = {name: parameter.detach().clone() for name, parameter in ffn.router.named_parameters()}
            bias_E, scale_E = ffn.selection_bias, ffn.gate_scale
            plan = replace(
                plan,
                router=replace(plan.router, tensors=tensors),
                gate=ffn.gate,
                selection_bias=None if bias_E is None else bias_E.detach().clone(),
                gate_scale=None if scale_E is None else scale_E.detach().clone(),
            )
        sites[path] = plan
    return replace(blueprint, sites=sites)
