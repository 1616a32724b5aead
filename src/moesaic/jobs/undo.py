"""The dense checkpoint back from a conversion that only moved neurons: every tensor as it was, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.anatomy import FAMILIES, read_anatomy
from moesaic.anatomy.base import Anatomy, FFNSite
from moesaic.blueprint.attention import VALUE_TENSORS
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.head import with_true_tie
from moesaic.checkpoint.mark import tuned
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError
from moesaic.materialise.pack import TENSOR_NAMES, dense_tensors, unpack
from moesaic.staging.manifest import check_manifest
from moesaic.staging.writer import StagedOutput
from moesaic.targets.write import BESIDE


def undo(folder: str | Path, out: str | Path, *, restart: bool = False) -> Path:
    """Write to ``out`` the dense checkpoint that the conversion in ``folder`` was made from; returns ``out``.

    Values and names of the tensors are those of the source (with the base model's prefix, where the source lacks it).
    config.json has its content, but for a flag that ties a head of its own to the embeddings. The division into shards
    is the conversion's. Of a conversion in place it is the whole multimodal checkpoint.
    One shard is in memory at a time. Interrupted, the same call resumes.

    Args:
        folder: An output of ``moesaic convert``.
        out: Folder to create.
        restart: Throw away an unfinished ``out.partial``.

    Raises:
        InputError: ``folder`` is no conversion, or a lossy one (pruned, faded, refitted); nothing is written.
        VerificationError: files of ``folder`` are not those that were written.
        ResourceError: the disk is full.
    """
    StagedOutput.check(out, folder)
    converted = Checkpoint(Path(folder).expanduser())
    dense_config = converted.config.get("text_config")
    if converted.config.get("model_type") != "moesaic" and "moesaic" in converted.config:
        raise InputError(
            f"{folder} is of the architecture {converted.config.get('model_type')}",
            "undo takes folders of --target moesaic; keep the dense model instead",
        )
    if converted.config.get("model_type") != "moesaic" or not isinstance(dense_config, dict):
        raise InputError(f"{folder} is not an output of moesaic convert", "give the folder of a converted model")
    if reason := tuned(converted.config):
        raise InputError(f"{folder} cannot be undone: {reason}", "keep the dense model instead")
    check_manifest(converted.folder)
    blueprint = Blueprint.load(converted.folder)
    if reason := why_not(blueprint):
        raise InputError(f"{folder} cannot be undone: {reason}", "keep the dense model instead")
    family = FAMILIES[dense_config["model_type"]]
    anatomy = read_anatomy(dense_config, hierarchical=family.moe is not None)
    key = {"undo": blueprint.digest(), "source": blueprint.source, "moesaic": converted.config.get("moesaic")}
    whole, size = converted.whole, converted.nbytes + converted.nbytes_beside
    with StagedOutput.open(out, key, source=converted.folder, expected_bytes=size, restart=restart) as staged:
        for number, names in enumerate(_shards(converted)):
            step = f"shard-{number:05d}"
            if not staged.done(step):
                tensors = _dense_shard(converted, anatomy, blueprint, names)
                spelt = {name if whole is None else whole.spelt(name): tensor for name, tensor in tensors.items()}
                staged.write_shard(step, spelt)
        if whole is not None and whole.carried and not staged.done(BESIDE):
            staged.write_shard(BESIDE, converted.beside())
        for path in converted.side_files(whole=whole is not None):
            staged.copy_file(path, path.relative_to(converted.folder).as_posix())
        config = with_true_tie(dense_config, converted) if whole is None else whole.config
        staged.write_text("config.json", json.dumps(config, indent=2) + "\n")
        return staged.finish(manifest=False)


def why_not(blueprint: Blueprint) -> str | None:
    """Why the dense model cannot be had back from a conversion of the ``moesaic`` architecture; None when it can."""
    for path, plan in blueprint.sites.items():
        if reason := what_is_lost(plan):
            return f"{path} {reason}"
    for path, attention in blueprint.attention.items():
        if attention.pairs is not None:
            return f"{path} kept only {len(attention.pairs)} of {attention.head_dim // 2} rotary pairs"
    return None


def what_is_lost(plan: LayerPlan) -> str | None:
    """Why the dense FFN cannot be had back from its conversion under this plan; None when it can."""
    if plan.keeps_all:
        return None
    changes = {
        "has weights that were trained after the conversion": plan.trained or None,
        "has weights that were rounded to int8": plan.int8 or None,
        "has small weights set to zero (fade)": plan.fade,
        "has scaled down projections": plan.expert_scale,
        "has a refitted down projection": plan.readout,
        "has a refitted output bias": plan.bias,
        "has trained neurons": plan.projections or None,
    }
    for reason, change in changes.items():
        if change is not None:
            return reason
    kept = len(torch.unique(plan.packed[plan.packed >= 0]))
    if kept < plan.d_ff:
        return f"kept only {kept} of {plan.d_ff} neurons"
    return "holds some neurons more than once"


def _shards(converted: Checkpoint) -> Iterator[list[str]]:
    for file in converted.files:
        if names := [name for name in converted.names if converted.info(name).file == file]:
            yield names


def _dense_shard(
    converted: Checkpoint, anatomy: Anatomy, blueprint: Blueprint, names: list[str]
) -> Mapping[str, Tensor]:
    """The dense form of one shard's tensors: converted FFNs rebuilt, everything else as it is."""
    sites = {site.path: site for site in anatomy.sites if site.path in blueprint.sites}
    owner = {f"{path}.{leaf}": path for path in sites for leaf in _leaves(blueprint.sites[path])}
    added = {f"{path}.value_mask.{leaf}" for path in blueprint.attention for leaf in VALUE_TENSORS}
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name not in owner and name not in added:
            tensors[anatomy.family.disk_name(name)] = converted.tensor(name)
    stacks: dict[str, dict[int, Tensor]] = {}
    for path in dict.fromkeys(owner[name] for name in names if name in owner):
        site = sites[path]
        made = _dense_site(converted, site, blueprint.sites[path], anatomy.activation)
        if site.names.stacked and site.expert is not None:
            for name, tensor in made.items():
                stacks.setdefault(name, {})[site.expert] = tensor
        else:
            tensors |= made
    return tensors | {name: torch.stack([part for _, part in sorted(of.items())]) for name, of in stacks.items()}


def _leaves(plan: LayerPlan) -> list[str]:
    """Names, relative to the FFN, of every tensor that its conversion can have."""
    router = [f"router.{name}" for name in plan.router.tensors]
    return [*TENSOR_NAMES.values(), *router, "selection_bias", "gate_scale", "membership"]


def _dense_site(converted: Checkpoint, site: FFNSite, plan: LayerPlan, activation: str) -> dict[str, Tensor]:
    packed: dict[str, Any] = {
        leaf: converted.tensor(f"{site.path}.{leaf}")
        for leaf in TENSOR_NAMES.values()
        if f"{site.path}.{leaf}" in converted
    }
    return dense_tensors(unpack(packed, plan, activation), site)
