"""What goes into an output folder: which tensors are copied, which are packed anew, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import moesaic
from moesaic.anatomy.base import Anatomy
from moesaic.anatomy.weights import ffn_tensor_names, load_ffn
from moesaic.blueprint import Blueprint, LayerPlan
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.writer import StagedOutput
from moesaic.materialise import pack, site_spec
from moesaic.targets.moesaic import MODELLING_FILE, config_json, modelling_source


def output_names(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[str, str]:
    """Every tensor of the checkpoint -> the name that transformers' modules use, under which a copy is written.

    Two differences occur: checkpoints saved without the base model's prefix (GPT-2's ``h.0.attn...``), and blocks that
    transformers renames on loading (Mixtral's ``block_sparse_moe``).
    """
    bare = not any(name.startswith(f"{anatomy.family.layers}.") for name in checkpoint.names)
    prefix = f"{anatomy.family.prefix}." if bare else ""
    moe = anatomy.family.moe
    names = {name: name if name.startswith("lm_head.") else prefix + name for name in checkpoint.names}
    if moe is not None and moe.block != moe.block_on_disk:
        names = {name: out.replace(f".{moe.block_on_disk}.", f".{moe.block}.") for name, out in names.items()}
    return names


def write_layer(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    staged: StagedOutput,
    step: str,
    layer: int,
    plans: Mapping[str, LayerPlan],
) -> None:
    """Write one decoder layer: converted FFNs packed, everything else byte for byte."""
    prefix = f"{anatomy.layer_path(layer)}."
    replaced: set[str] = set()
    tensors: dict[str, Tensor] = {}
    for site in anatomy.sites_of(layer):
        if site.path in plans:
            weights = load_ffn(checkpoint, site, anatomy.activation)
            tensors |= {f"{site.path}.{name}": tensor for name, tensor in pack(weights, plans[site.path]).items()}
            replaced |= ffn_tensor_names(checkpoint, site)
    for name, out in output_names(checkpoint, anatomy).items():
        if out.startswith(prefix) and name not in replaced:
            tensors[out] = checkpoint.finite_tensor(name)
    staged.write_shard(step, tensors)


def write_rest(
    checkpoint: Checkpoint, anatomy: Anatomy, staged: StagedOutput, blueprint: Blueprint, calibration: Any
) -> None:
    """Write embeddings, norms and head, config.json, tokenizer files, blueprint and the modelling file.

    ``calibration``: the calibration settings, ready for JSON, or None; they go into config.json's ``moesaic`` block.
    """
    step = "rest"
    if not staged.done(step):
        layers = tuple(f"{anatomy.layer_path(layer)}." for layer in range(anatomy.num_layers))
        names = output_names(checkpoint, anatomy)
        rest = {out: checkpoint.finite_tensor(name) for name, out in names.items() if not out.startswith(layers)}
        staged.write_shard(step, rest)
    for path in checkpoint.side_files():
        staged.copy_file(path)
    staged.write_text(MODELLING_FILE, modelling_source())
    blueprint.save(staged.folder)
    provenance = {
        "version": moesaic.__version__,
        "method": blueprint.method,
        "config": blueprint.config,
        "source": checkpoint.fingerprint(),
        "calibration": calibration,
        "blueprint": blueprint.digest(),
    }
    config = config_json(anatomy, checkpoint.config, _specs(checkpoint, anatomy, blueprint), provenance)
    staged.write_text("config.json", json.dumps(config, indent=2) + "\n")


def _specs(checkpoint: Checkpoint, anatomy: Anatomy, blueprint: Blueprint) -> dict[str, dict[str, Any]]:
    return {
        site.path: site_spec(load_ffn(checkpoint, site, anatomy.activation), blueprint.sites[site.path])
        for site in anatomy.sites
        if site.path in blueprint.sites
    }
