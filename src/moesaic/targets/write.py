"""What goes into an output folder: which tensors are copied, which are packed anew, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

import moesaic
from moesaic.anatomy.base import Anatomy, FFNSite
from moesaic.blueprint.attention import AttentionPlan
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.ffn import ffn_tensor_names, load_ffn
from moesaic.checkpoint.head import with_true_tie
from moesaic.checkpoint.origin import read_origin
from moesaic.checkpoint.reader import Checkpoint
from moesaic.materialise.pack import pack
from moesaic.staging.writer import StagedOutput
from moesaic.targets import moesaic as moesaic_target
from moesaic.targets.base import Split, TargetModule, TargetOptions


def output_names(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[str, str]:
    """Every weight of the checkpoint -> the name that transformers' modules use, under which a copy is written.

    Differences occur: checkpoints saved without the base model's prefix (GPT-2's ``h.0.attn...``), parts that
    transformers renames on loading (``Family.renames``), and buffers of old checkpoints, which are left out.
    """
    family = anatomy.family
    bare = not any(name.startswith(f"{family.layers}.") for name in checkpoint.names)
    prefix = f"{family.prefix}." if bare else ""
    names = {}
    for name in checkpoint.names:
        in_model = family.model_name(name)
        if not name.endswith(family.buffers):
            names[name] = in_model if in_model.startswith("lm_head.") else prefix + in_model
    return names


def read_split(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    plans: Mapping[str, LayerPlan],
    attention: Mapping[str, AttentionPlan] = MappingProxyType({}),
) -> Split:
    """The dense model of ``checkpoint`` under ``plans``, as targets see it. Reads names of tensors, no weights."""
    specs = {
        site.path: _spec(checkpoint, anatomy, site, plans[site.path]) for site in anatomy.sites if site.path in plans
    }
    return Split(anatomy, plans, specs, attention)


def write_layer(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    staged: StagedOutput,
    step: str,
    layer: int,
    plans: Mapping[str, LayerPlan],
    target: TargetModule = moesaic_target,
    options: TargetOptions = TargetOptions(),
    attention: Mapping[str, AttentionPlan] = MappingProxyType({}),
) -> None:
    """Write one decoder layer: converted FFNs and pruned attention as ``target`` writes them, everything else copied.

    ``plans``: of the whole model, as most targets have one size for all layers; for ``moesaic`` those of the layer do,
    for ``attention`` as well.
    """
    prefix = f"{anatomy.layer_path(layer)}."
    replaced: set[str] = set()
    packed: dict[str, dict[str, Tensor]] = {}
    for site in anatomy.sites_of(layer):
        if site.path in plans:
            packed[site.path] = pack(load_ffn(checkpoint, site, anatomy.activation), plans[site.path])
            replaced |= ffn_tensor_names(checkpoint, site)
    names = output_names(checkpoint, anatomy).items()
    copied = {
        out: checkpoint.finite_tensor(name) for name, out in names if out.startswith(prefix) and name not in replaced
    }
    split = Split(anatomy, plans, {}, attention)
    staged.write_shard(step, target.layer_tensors(split, layer, copied, packed, options))


def write_rest(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    staged: StagedOutput,
    blueprint: Blueprint,
    made: Mapping[str, Any] | None = None,
    target: TargetModule = moesaic_target,
    options: TargetOptions = TargetOptions(),
) -> None:
    """Write embeddings, norms and head, config.json, tokenizer files, blueprint and what else the target needs.

    ``made``: how it was made (calibration, router, target), ready for JSON, for config.json's block ``moesaic``.
    """
    step = "rest"
    split = read_split(checkpoint, anatomy, blueprint.sites, blueprint.attention)
    if not staged.done(step):
        layers = tuple(f"{anatomy.layer_path(layer)}." for layer in range(anatomy.num_layers))
        names = output_names(checkpoint, anatomy)
        rest = {out: checkpoint.finite_tensor(name) for name, out in names.items() if not out.startswith(layers)}
        staged.write_shard(step, target.rest_tensors(split, rest))
    provenance = {
        "version": moesaic.__version__,
        **read_origin(checkpoint.folder, checkpoint.config).to_dict(),
        "method": blueprint.method,
        "config": blueprint.config,
        "source": checkpoint.fingerprint(),
        "blueprint": blueprint.digest(),
        **(made or {}),
    }
    write_side_files(checkpoint, staged, split, blueprint, provenance, target, options)


def write_side_files(
    checkpoint: Checkpoint,
    staged: StagedOutput,
    split: Split,
    blueprint: Blueprint,
    provenance: Mapping[str, Any],
    target: TargetModule,
    options: TargetOptions,
) -> None:
    """Write what stands beside the weights: tokenizer and licence of ``checkpoint``, blueprint, config.json."""
    for path in checkpoint.side_files():
        staged.copy_file(path, path.relative_to(checkpoint.folder).as_posix())
    for name, text in target.files().items():
        staged.write_text(name, text)
    blueprint.save(staged.folder)
    config = with_true_tie(target.config_json(split, provenance, options), checkpoint)
    staged.write_text("config.json", json.dumps(config, indent=2) + "\n")


def _spec(checkpoint: Checkpoint, anatomy: Anatomy, site: FFNSite, plan: LayerPlan) -> dict[str, Any]:
    """``materialise.site_spec`` without the weights."""
    names = ffn_tensor_names(checkpoint, site)

    def has_bias(role: str) -> bool:
        # The checkpoint may have its names without the base model's prefix.
        base = site.tensor_names().get(role, "")
        return bool(base) and not names.isdisjoint({f"{base}.bias", f"{base.partition('.')[2]}.bias"})

    up_bias = has_bias("up")
    return {
        **plan.spec(),
        "gated": site.names.gated,
        "gate_bias": up_bias if site.names.fused else has_bias("gate"),
        "up_bias": up_bias,
        "down_bias": has_bias("down") or plan.bias is not None,
    }
