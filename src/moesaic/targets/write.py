"""What goes into an output folder: every layer's tensors as the target writes them, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

import moesaic
from moesaic.anatomy.base import Anatomy, FFNSite
from moesaic.anatomy.wrappers import WHOLE_CONFIG, Whole
from moesaic.blueprint.attention import AttentionPlan
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.ffn import ffn_tensor_names, load_ffn
from moesaic.checkpoint.head import FLAG, with_true_tie
from moesaic.checkpoint.origin import read_origin
from moesaic.checkpoint.reader import Checkpoint
from moesaic.materialise.pack import pack
from moesaic.progress import Progress
from moesaic.staging.writer import StagedOutput
from moesaic.targets.base import Split, Target, TargetOptions

Copied = dict[str, Tensor]
"""Tensors that stay as they are, under the names of the dense model's modules."""
PackedFFNs = dict[str, dict[str, Tensor]]
"""Per converted FFN, by module path: its tensors as ``materialise.pack`` makes them."""
REST = "rest"
"""Name of the step that writes what stands outside the decoder layers."""
BESIDE = "beside"
"""Name of the step that writes what stands beside the text model, of a conversion in place."""


def step_of(layer: int) -> str:
    """Name of a layer's step in the staging folder."""
    return f"layer-{layer:05d}"


class Source(Protocol):
    """Where the tensors of an output come from."""

    def layer(self, layer: int) -> tuple[Copied, PackedFFNs]:
        """One decoder layer: what is copied, and its converted FFNs."""
        ...

    def rest(self) -> Copied:
        """The tensors outside the decoder layers."""
        ...

    def beside(self) -> Copied:
        """The tensors beside the text model, under their names in the multimodal model that it stays in."""
        ...


def write_model(
    source: Source, split: Split, target: Target, options: TargetOptions, staged: StagedOutput, progress: Progress
) -> None:
    """Write every tensor that the staging folder does not have yet, layer by layer."""
    layers, whole = split.anatomy.num_layers, split.whole

    def write(step: str, tensors: Mapping[str, Tensor]) -> None:
        names = tensors if whole is None else {whole.spelt(name): tensor for name, tensor in tensors.items()}
        staged.write_shard(step, names)

    progress.start(f"{target.name}: writing", layers)
    for layer in range(layers):
        if not staged.done(step_of(layer)):
            copied, packed = source.layer(layer)
            write(step_of(layer), target.layer_tensors(split, layer, copied, packed, options))
        progress.advance(f"layer {layer}")
    if not staged.done(REST):
        write(REST, target.rest_tensors(split, source.rest()))
    if whole is not None and whole.carried and not staged.done(BESIDE):
        staged.write_shard(BESIDE, source.beside())


class DenseSource:
    """A dense checkpoint, whose FFNs are packed as the plans say."""

    def __init__(self, checkpoint: Checkpoint, split: Split) -> None:
        self._checkpoint, self._split = checkpoint, split
        self._names = output_names(checkpoint, split.anatomy)

    def layer(self, layer: int) -> tuple[Copied, PackedFFNs]:
        """See :class:`Source`."""
        checkpoint, anatomy, plans = self._checkpoint, self._split.anatomy, self._split.plans
        replaced: set[str] = set()
        packed: PackedFFNs = {}
        for site in anatomy.sites_of(layer):
            if site.path in plans:
                packed[site.path] = pack(load_ffn(checkpoint, site, anatomy.activation), plans[site.path])
                replaced |= ffn_tensor_names(checkpoint, site)
        prefix = f"{anatomy.layer_path(layer)}."
        names = [(out, name) for name, out in self._names.items() if out.startswith(prefix) and name not in replaced]
        return {out: checkpoint.finite_tensor(name) for out, name in names}, packed

    def rest(self) -> Copied:
        """See :class:`Source`."""
        layers = layer_prefixes(self._split.anatomy)
        return {
            out: self._checkpoint.finite_tensor(name) for name, out in self._names.items() if not out.startswith(layers)
        }

    def beside(self) -> Copied:
        """See :class:`Source`."""
        return self._checkpoint.beside()


class ConvertedSource:
    """A folder of the ``moesaic`` architecture, whose FFNs are packed already."""

    def __init__(self, checkpoint: Checkpoint, split: Split) -> None:
        self._checkpoint, self._split = checkpoint, split

    def layer(self, layer: int) -> tuple[Copied, PackedFFNs]:
        """See :class:`Source`."""
        split = self._split
        prefix = f"{split.anatomy.layer_path(layer)}."
        paths = [site.path for site in split.anatomy.sites_of(layer) if site.path in split.plans]
        copied: Copied = {}
        packed: PackedFFNs = {path: {} for path in paths}
        for name in self._checkpoint.names:
            if not name.startswith(prefix):
                continue
            owner = next((path for path in paths if name.startswith(f"{path}.")), None)
            if owner is not None and name.startswith(f"{owner}.act_fn."):
                owner = None  # of a learned activation, which no split changes
            if owner is None:
                copied[name] = self._checkpoint.finite_tensor(name)
            else:
                packed[owner][name.removeprefix(f"{owner}.")] = self._checkpoint.finite_tensor(name)
        return copied, packed

    def rest(self) -> Copied:
        """See :class:`Source`."""
        layers = layer_prefixes(self._split.anatomy)
        names = [name for name in self._checkpoint.names if not name.startswith(layers)]
        return {name: self._checkpoint.finite_tensor(name) for name in names}

    def beside(self) -> Copied:
        """See :class:`Source`."""
        return self._checkpoint.beside()


def layer_prefixes(anatomy: Anatomy) -> tuple[str, ...]:
    """How the names of all tensors of decoder layers begin."""
    return tuple(f"{anatomy.layer_path(layer)}." for layer in range(anatomy.num_layers))


def output_names(checkpoint: Checkpoint, anatomy: Anatomy) -> dict[str, str]:
    """Every weight of the checkpoint -> the name that transformers' modules use, under which a copy is written.

    Differences occur: checkpoints saved without the base model's prefix (GPT-2's ``h.0.attn...``), parts that
    transformers renames on loading (``Family.renames``), and what it does not read (:meth:`Anatomy.unread`), which is
    left out.
    """
    family = anatomy.family
    bare = not any(name.startswith(f"{family.layers}.") for name in checkpoint.names)
    prefix = f"{family.prefix}." if bare else ""
    names = {}
    for name in checkpoint.names:
        in_model = family.model_name(name)
        if not anatomy.unread(name):
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


def provenance_of(
    checkpoint: Checkpoint, blueprint: Blueprint, made: Mapping[str, Any], whole: Whole | None = None
) -> dict[str, Any]:
    """config.json's block ``moesaic`` for what is made from a dense model.

    ``made``: calibration, router, target. ``whole``: the multimodal model that it stays in.
    """
    return {
        "version": moesaic.__version__,
        **read_origin(checkpoint.folder, checkpoint.config).to_dict(),
        **wrapper_of_text(checkpoint, whole),
        "method": blueprint.method,
        "config": blueprint.config,
        "source": checkpoint.fingerprint(),
        "blueprint": blueprint.digest(),
        **made,
    }


def wrapper_of_text(checkpoint: Checkpoint, whole: Whole | None = None) -> dict[str, Any]:
    """For that block: the wrapper whose text model is read from ``checkpoint``, and what is left out of it."""
    if checkpoint.wrapper is None:
        return {}
    left_out = checkpoint.left_out if whole is None else ()
    return {"wrapper": {"model_type": checkpoint.wrapper, "left_out": list(left_out)}}


def write_side_files(
    checkpoint: Checkpoint,
    staged: StagedOutput,
    split: Split,
    blueprint: Blueprint,
    provenance: Mapping[str, Any],
    target: Target,
    options: TargetOptions,
) -> None:
    """Write what stands beside the weights: tokenizer and licence of ``checkpoint``, blueprint, config.json."""
    for path in checkpoint.side_files(whole=split.whole is not None):
        staged.copy_file(path, path.relative_to(checkpoint.folder).as_posix())
    for name, text in target.files().items():
        staged.write_text(name, text)
    blueprint.save(staged.folder)
    config = target.config_json(split, provenance, options)
    if split.whole is not None and WHOLE_CONFIG not in config:
        config = _inside(config, split.whole.config)
    config = with_true_tie(config, checkpoint)
    staged.write_text("config.json", json.dumps(config, indent=2) + "\n")


def _inside(config: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a multimodal model around the text model of a stock architecture, from its own and from that."""
    of_text = {key: value for key, value in config.items() if key not in ("moesaic", "architectures")}
    # Without the version that wrote the source: it would say that transformers has saved this folder.
    around = {key: value for key, value in whole.items() if key != "transformers_version"}
    return {**around, "text_config": of_text, FLAG: bool(config.get(FLAG)), "moesaic": config["moesaic"]}


def _spec(checkpoint: Checkpoint, anatomy: Anatomy, site: FFNSite, plan: LayerPlan) -> dict[str, Any]:
    """``materialise.site_spec`` without the weights."""
    names = ffn_tensor_names(checkpoint, site)

    def has_bias(role: str) -> bool:
        # The checkpoint may have its names without the base model's prefix.
        if role not in site.tensor_names():
            return False
        name = site.bias_name(role)
        return not names.isdisjoint({name, name.partition(".")[2]})

    up_bias = has_bias("up")
    return {
        **plan.spec(),
        "gated": site.names.gated,
        "gate_bias": up_bias if site.names.fused else has_bias("gate"),
        "up_bias": up_bias,
        "down_bias": has_bias("down") or plan.bias is not None,
    }
