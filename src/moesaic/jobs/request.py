"""What a conversion is asked to do, resolved once; and what it can be refused for at once, without torch: paths,
options, config.json, headers of the shards."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moesaic.anatomy import read_anatomy
from moesaic.anatomy.base import Anatomy, max_positions
from moesaic.anatomy.wrappers import Whole
from moesaic.blueprint.shape import FFNShape
from moesaic.calibration.config import check_sources
from moesaic.checkpoint.ffn import check_shapes, ffn_tensor_names
from moesaic.checkpoint.reader import Checkpoint, Headers
from moesaic.checkpoint.source import resolve_model
from moesaic.checkpoint.tokenizer import require_tokenizer
from moesaic.errors import CheckpointError, InputError
from moesaic.jobs.settings import ConvertSettings, check_layers, method_config
from moesaic.methods.base import MethodConfig
from moesaic.staging.placement import absolute, check_output
from moesaic.targets import AUTO, OWN, TARGETS, likely_target, refuse
from moesaic.targets.base import Split
from moesaic.train.launch import check_shared


@dataclass(frozen=True)
class Outline:
    """A conversion as far as options and config.json show it.

    Attributes:
        settings: As given.
        config: The method's own options.
        anatomy: Of the model.
        dense_layers: Layers that stay dense, counted from 0.
        split: What the FFNs are expected to become.
    """

    settings: ConvertSettings
    config: MethodConfig
    anatomy: Anatomy
    dense_layers: tuple[int, ...]
    split: Split

    @property
    def shape(self) -> FFNShape:
        """What the first converted FFN is expected to become."""
        return next(iter(self.split.shapes.values()))

    @property
    def target(self) -> str:
        """The architecture that the output will have, as far as that shows without transformers."""
        if self.settings.target == AUTO and (self.config.prunes_attention or self.split.attention):
            return OWN
        return likely_target(self.split, self.settings.target, self.settings.target_options)

    @property
    def reads_text(self) -> bool:
        """Whether the conversion reads calibration text."""
        settings = self.settings
        decides = self.config.needs_calibration()
        return decides or any(value is not None for value in (settings.router, settings.allocation, settings.budget))

    @property
    def ffn_parameters(self) -> int:
        """Weights of all FFNs of the dense model."""
        return sum(site.d_ff for site in self.anatomy.sites) * (3 if self.anatomy.gated else 2) * self.anatomy.d_model

    @property
    def active_fraction(self) -> float:
        """Of the neurons of a converted FFN, what one token uses."""
        return min(1.0, self.shape.active / self.shape.d_ff)

    @property
    def cut_fractions(self) -> tuple[float, ...]:
        """Of the neurons, what layers are cut to where their sensitivity is measured."""
        assert self.settings.allocation is not None
        active = active_neurons(self.config, self.anatomy.d_ff)
        return self.settings.allocation.fractions_for(active / self.anatomy.d_ff)


@dataclass(frozen=True)
class Request(Outline):
    """A conversion that is possible as far as headers show. ``blueprint``: of the folder that decides the split."""

    checkpoint: Checkpoint
    blueprint: Path | None


def check_request(
    model: str | Path,
    settings: ConvertSettings,
    output: str | Path | None = None,
    *,
    blueprint: str | Path | None = None,
) -> Request:
    """Resolve ``model`` (which may fetch or dequantise it) and refuse what cannot work.

    Args:
        model: Local folder, .gguf file or hub id.
        settings: The conversion.
        output: The folder to create, when there is to be one.
        blueprint: A blueprint that says how FFNs are split, in place of the method.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: naming the path, option, file or tensor.
        ResourceError: no room for the dequantised copy of a .gguf.
    """
    given = None if blueprint is None else Path(blueprint).expanduser()
    if settings.budget is not None and given is None:
        raise InputError(
            "a budget is for the experts of a blueprint, and none is given",
            "give --blueprint too, or --active: the fraction that a method plans",
        )
    if given is not None:
        _check_beside_blueprint(settings)
    config = check_options(settings)
    if output is not None:  # before a model is fetched for it
        check_output(absolute(output), local_folder(model))
    checkpoint = Checkpoint(resolve_model(str(model)))
    anatomy = read_anatomy(checkpoint.config, hierarchical=settings.hierarchical)
    whole = kept_whole(settings, checkpoint.whole, anatomy)
    if given is None:
        outline = outline_of(settings, config, anatomy, whole)
        check_stored(checkpoint, outline)
    else:  # the method and its options count for nothing then
        outline = Outline(settings, config, anatomy, check_layers(anatomy, settings.dense_layers), Split(anatomy))
        outline = replace(outline, split=replace(outline.split, whole=whole))
        check_headers(checkpoint, anatomy)
    return Request(**vars(outline), checkpoint=checkpoint, blueprint=given)


def _check_beside_blueprint(settings: ConvertSettings) -> None:
    """Refuse settings that a blueprint would silently overrule."""
    asked = settings.model_fields_set
    if decided := [name for name in ("method", "options") if name in asked and getattr(settings, name)]:
        raise InputError(
            "a blueprint says already how every FFN is split",
            f"leave {' and '.join(decided)} out; budget changes what its experts may use",
        )
    if settings.allocation is not None or settings.dense_layers:
        raise InputError("a blueprint says already which layers are dense", "leave allocation and dense layers out")


def check_options(settings: ConvertSettings) -> MethodConfig:
    """The method's own options. Refuses what the settings alone show: needs of the method, texts that are not there."""
    config = method_config(settings)
    _check_whole_model(settings, config)
    wanted = (settings.router, settings.allocation, settings.budget)
    named = settings.calibration.names_sources  # a slip in a name is one, whether the text is read or not
    if named or config.needs_calibration() or any(value is not None for value in wanted):
        check_sources(settings.calibration)
    return config


def kept_whole(settings: ConvertSettings, whole: Whole | None, anatomy: Anatomy) -> Whole | None:
    """The multimodal model that the text model stays in, where the settings ask for that. Refuses any other model."""
    if settings.whole and whole is None:
        kind = anatomy.family.model_type
        raise InputError(f"whole is for multimodal checkpoints, this is a {kind} model", "leave --whole out")
    return whole if settings.whole else None


def outline_of(
    settings: ConvertSettings, config: MethodConfig, anatomy: Anatomy, whole: Whole | None = None
) -> Outline:
    """The conversion of a model. Refuses experts that do not fit, and layers that do not exist.

    ``whole``: the multimodal model that it stays in.
    """
    for width in {site.d_ff for site in anatomy.sites}:
        config.check(width)
    dense_layers = check_layers(anatomy, settings.dense_layers)
    sites = [site for site in anatomy.sites if site.layer not in dense_layers]
    by_width = {width: config.sizes(width) for width in {site.d_ff for site in sites}}
    split = expected_split(settings, anatomy, {site.path: by_width[site.d_ff] for site in sites})
    return Outline(settings, config, anatomy, dense_layers, replace(split, whole=whole))


def expected_split(settings: ConvertSettings, anatomy: Anatomy, shapes: Mapping[str, FFNShape]) -> Split:
    """The model as targets will see it, once its routers are replaced where the settings ask for that."""
    fits = settings.router is not None
    return Split(anatomy, expected={path: shape.fitted() if fits else shape for path, shape in shapes.items()})


def check_stored(stored: Headers, outline: Outline) -> None:
    """What `plan` and `convert` refuse of a method's conversion of these files."""
    check_split(outline)
    check_headers(stored, outline.anatomy)
    if outline.reads_text:
        require_tokenizer(stored.folder)


def check_headers(stored: Headers, anatomy: Anatomy) -> None:
    """Refuse a model whose FFNs are not in its weight files as config.json describes them, or that has more layers
    there."""
    for site in anatomy.sites:
        ffn_tensor_names(stored, site)
        check_shapes(stored, site, anatomy.d_model)
    layers = re.compile(rf"(?:.*\.)?{re.escape(anatomy.family.layers.rpartition('.')[2])}\.(\d+)\.")
    read = (name for name in stored.names if not anatomy.unread(name))
    found = 1 + max(int(match[1]) for name in read if (match := layers.match(name)))
    if found > anatomy.num_layers:
        raise CheckpointError(
            f"{stored.folder}: config.json says {anatomy.num_layers} layers, the weights have {found}",
            f"set {anatomy.family.num_layers} to {found}, or load the model with transformers and save_pretrained",
        )


def check_split(outline: Outline) -> None:
    """Refuse a router, an allocation over layers or a target that the method's experts cannot have."""
    settings, shape = outline.settings, outline.shape
    if settings.router is not None and shape.router == "static":
        raise InputError(f"method {settings.method} routes nothing: all it keeps is always on", "leave --router out")
    if settings.router is not None and shape.varied:
        raise InputError(
            f"the router of {settings.method} counts what experts of different widths cost, another would not",
            "leave --router out, or add --set widths=equal",
        )
    if settings.router is not None and shape.router == "low_bit":
        raise InputError(
            f"the experts of {settings.method} are single neurons, too many for a linear router", "leave --router out"
        )
    if outline.config.needs_calibration():
        outline.config.check_text(settings.calibration.windows(max_positions(outline.anatomy.config)))
    check_allocation(outline)
    if settings.target != AUTO:
        reasons = TARGETS[settings.target].split_reasons(outline.split)
        refuse(settings.target, reasons, _remedy(outline))


def _remedy(outline: Outline) -> str:
    """What makes the target that was asked for hold the model, if an option does, and which one holds it as it is."""
    settings, target = outline.settings, TARGETS[outline.settings.target]

    def helps(change: Callable[[FFNShape], FFNShape]) -> bool:
        shapes = {path: change(shape) for path, shape in outline.split.shapes.items()}
        return not target.split_reasons(replace(outline.split, expected=shapes))

    options = []
    if outline.shape.varied and helps(lambda shape: replace(shape, varied=False)):
        options.append("add --set widths=equal")
    if settings.router is None and not outline.shape.varied and helps(FFNShape.fitted):
        options.append("add --router oracle")
    options.append(f"use --target {likely_target(outline.split, AUTO, settings.target_options)}")
    return ", or ".join(options)


def check_allocation(outline: Outline) -> None:
    """Refuse an allocation over layers that the method or the target cannot follow."""
    settings, config, anatomy = outline.settings, outline.config, outline.anatomy
    if settings.allocation is None:
        return
    if config.whole_model:
        raise InputError(f"method {settings.method} shares its neurons out itself", "leave allocation out")
    if not config.has_active:
        raise InputError(
            f"method {settings.method} has no active fraction to lower where layers stay dense",
            "choose token_clusters or static, or name the dense layers",
        )
    if anatomy.family.moe is not None or {site.d_ff for site in anatomy.sites} != {anatomy.d_ff}:
        raise InputError("allocation over layers is for dense models with one FFN width", "leave allocation out")
    if active_neurons(config, anatomy.d_ff) >= anatomy.d_ff:
        raise InputError(
            "every neuron is active: there is nothing to share out", "lower active, or leave allocation out"
        )
    settings.allocation.mode_for(settings.target, _uneven_targets(outline))
    if settings.target == AUTO and outline.shape.router == "static":
        raise InputError(
            f"without routing, target auto is a dense model whose layers are all as wide as the widest: {anatomy.d_ff}",
            "choose target moesaic",
        )


def _uneven_targets(outline: Outline) -> list[str]:
    """The targets whose layers need not be alike and that hold the model once its first layer stays dense."""
    first = outline.split.path_of(0)
    rest = {path: shape for path, shape in outline.split.shapes.items() if path != first}
    split = replace(outline.split, expected=rest)
    return [name for name, target in TARGETS.items() if target.freedom != "none" and not target.split_reasons(split)]


def active_neurons(config: MethodConfig, d_ff: int) -> int:
    """Neurons that one token uses of an FFN of ``d_ff``, padding of experts not counted."""
    shape = config.sizes(d_ff)
    return shape.shared + round(shape.active - shape.shared)


def at_active(config: MethodConfig, active: float) -> MethodConfig:
    """The config with another active fraction."""
    return config.model_copy(update={"active": active})


def _check_whole_model(settings: ConvertSettings, config: MethodConfig) -> None:
    """Refuse what a method that trains on the whole model leaves no room for."""
    if settings.whole and config.prunes_attention:
        raise InputError("with --whole the attention stays as it is", "add --set attention=none")
    if not config.whole_model:
        return
    if settings.router is not None:
        raise InputError(f"method {settings.method} learns its own linear router", "leave --router out")
    if settings.hierarchical:
        raise InputError(f"method {settings.method} starts from a dense model", "leave --hierarchical out")
    if config.prunes_attention and settings.target not in (AUTO, OWN):
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
