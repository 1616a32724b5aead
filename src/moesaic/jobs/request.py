"""What a conversion can be refused for at once, without torch: paths, options, config.json, headers of the shards."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from moesaic.anatomy import read_anatomy
from moesaic.anatomy.base import Anatomy
from moesaic.calibration.config import check_sources
from moesaic.checkpoint.ffn import ffn_tensor_names
from moesaic.checkpoint.reader import Checkpoint, StoredNames
from moesaic.checkpoint.source import resolve_model
from moesaic.errors import CheckpointError, InputError
from moesaic.jobs.forecast import prunes_attention, shape_of
from moesaic.jobs.settings import ConvertSettings, check_fits, method_config
from moesaic.methods.base import MethodConfig
from moesaic.staging.placement import absolute, check_output
from moesaic.targets import AUTO
from moesaic.targets.backbone import no_backbone
from moesaic.train.launch import check_shared


@dataclass(frozen=True)
class Request:
    """A model and what to do with it, possible as far as its headers show. ``dense_layers`` count from 0."""

    checkpoint: Checkpoint
    anatomy: Anatomy
    config: MethodConfig
    dense_layers: tuple[int, ...]


def check_request(
    model: str | Path, settings: ConvertSettings, output: str | Path | None = None, *, decided: bool = False
) -> Request:
    """Resolve ``model`` (which may fetch or dequantise it) and refuse what cannot work.

    Args:
        model: Local folder, .gguf file or hub id.
        settings: The conversion.
        output: The folder to create, when there is to be one.
        decided: A blueprint says how FFNs are split, not the method.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: naming the path, option, file or tensor.
        ResourceError: no room for the dequantised copy of a .gguf.
    """
    config = method_config(settings)
    if settings.active is not None and not decided:
        raise InputError("active changes the budget of a blueprint, and none is given", "set the method's own option")
    check_options(settings, config)
    if output is not None:  # before a model is fetched for it
        check_output(absolute(output), local_folder(model))
    checkpoint = Checkpoint(resolve_model(str(model)))
    anatomy = read_anatomy(checkpoint.config, hierarchical=settings.hierarchical)
    dense_layers = check_fits(config, anatomy, settings.dense_layers)
    if not decided:
        check_split(settings, config, anatomy)
    check_headers(checkpoint, anatomy)
    return Request(checkpoint, anatomy, config, dense_layers)


def check_headers(stored: StoredNames, anatomy: Anatomy) -> None:
    """Refuse a model whose FFNs are not in its weight files, or that has more layers there than config.json says."""
    for site in anatomy.sites:
        ffn_tensor_names(stored, site)
    layers = re.compile(rf"(?:.*\.)?{re.escape(anatomy.family.layers.rpartition('.')[2])}\.(\d+)\.")
    found = 1 + max(int(match[1]) for name in stored.names if (match := layers.match(name)))
    if found > anatomy.num_layers:
        raise CheckpointError(
            f"{stored.folder}: config.json says {anatomy.num_layers} layers, the weights have {found}",
            f"set {anatomy.family.num_layers} to {found}, or load the model with transformers and save_pretrained",
        )


def check_options(settings: ConvertSettings, config: MethodConfig) -> None:
    """Refuse what the settings alone show: needs of the method, calibration texts that are not there."""
    _check_whole_model(settings)
    needs_text = config.needs_calibration()
    if needs_text or any(value is not None for value in (settings.router, settings.allocation, settings.active)):
        check_sources(settings.calibration)


def check_split(settings: ConvertSettings, config: MethodConfig, anatomy: Anatomy) -> None:
    """Refuse a router, a budget over layers or a target that the method's experts cannot have."""
    shape = shape_of(settings, anatomy.d_ff)
    if settings.router is not None and shape.router == "static":
        raise InputError(f"method {settings.method} routes nothing: all it keeps is always on", "leave --router out")
    if settings.router is not None and shape.varied:
        raise InputError(
            f"the router of {settings.method} counts what experts of different widths cost, another would not",
            "leave --router out, or add --set widths=equal",
        )
    check_allocation(settings, config, anatomy)
    name = settings.target
    if name in (AUTO, "moesaic"):
        return
    if name == "dense":
        if shape.router != "static":
            raise InputError(
                f"target dense cannot hold this model: {settings.method} chooses experts per token", "use --target auto"
            )
    elif reason := no_backbone(anatomy):
        raise InputError(f"target {name} cannot hold this model: {reason}", "use --target auto")
    elif not shape.experts:
        raise InputError(
            f"target {name} cannot hold this model: no FFN has routed experts", "use --target dense, or moesaic"
        )
    elif shape.varied:
        raise InputError(
            f"target {name} cannot hold this model: it would compute the widest expert for every token",
            "add --set widths=equal, or use --target moesaic",
        )
    elif shape.router == "gated" or shape.normalised:
        raise InputError(
            f"target {name} has linear routers, those of {settings.method} are of another kind",
            "add --router oracle, or use --target moesaic",
        )


def check_allocation(settings: ConvertSettings, config: MethodConfig, anatomy: Anatomy) -> None:
    """Refuse a budget over layers that the method or the target cannot follow."""
    if settings.allocation is None:
        return
    if config.whole_model:
        raise InputError(f"method {settings.method} shares its budget out itself", "leave allocation out")
    if not config.has_active:
        raise InputError(
            f"method {settings.method} has no active fraction to lower where layers stay dense",
            "choose token_clusters or static, or name the dense layers",
        )
    if anatomy.family.moe is not None or {site.d_ff for site in anatomy.sites} != {anatomy.d_ff}:
        raise InputError("a budget over layers is for dense models with one FFN width", "leave allocation out")
    if active_neurons(config, anatomy.d_ff) >= anatomy.d_ff:
        raise InputError(
            "every neuron is active: there is nothing to share out", "lower active, or leave allocation out"
        )
    settings.allocation.mode_for(settings.target)
    if settings.target == AUTO and shape_of(settings, anatomy.d_ff).router == "static":
        raise InputError(
            f"without routing, target auto is a dense model whose layers are all as wide as the widest: {anatomy.d_ff}",
            "choose target moesaic",
        )


def active_neurons(config: MethodConfig, d_ff: int) -> int:
    """Neurons that one token uses of an FFN of ``d_ff``, padding of experts not counted."""
    parts = config.sizes(d_ff)
    return parts.shared + (round(parts.top_k * sum(parts.own) / len(parts.own)) if parts.own else 0)


def at_active(config: MethodConfig, active: float) -> MethodConfig:
    """The config with another active fraction."""
    return config.model_copy(update={"active": active})


def _check_whole_model(settings: ConvertSettings) -> None:
    """Refuse what a method that trains on the whole model leaves no room for."""
    config = method_config(settings)
    if not config.whole_model:
        return
    if settings.router is not None:
        raise InputError(f"method {settings.method} learns its own linear router", "leave --router out")
    if settings.hierarchical:
        raise InputError(f"method {settings.method} starts from a dense model", "leave --hierarchical out")
    if prunes_attention(settings) and settings.target not in (AUTO, "moesaic"):
        raise InputError(f"target {settings.target} has no pruned attention", "choose moesaic, or attention: none")
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("training needs accelerate", "pip install 'moesaic[tune]'")
    if config.training is not None:
        check_shared(config.training.batch, config.training.accumulate)


def local_folder(model: str | Path) -> Path | None:
    """The model's folder when it is a local one."""
    try:
        path = Path(model).expanduser()
        return path if str(model) and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # resolve_model says what is wrong with it
        return None
