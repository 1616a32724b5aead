"""What a conversion would make: shapes, memory, time, targets. No torch here.

It reads config.json and, where there are weights, their headers, by the checks that `convert` begins with; of a GGUF
the header.

The figures for time and memory are forecasts from counted operations and bytes (pace.py, forecast.py);
``docs/results`` holds measured ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.anatomy import read_anatomy
from moesaic.anatomy.base import Anatomy
from moesaic.anatomy.wrappers import Whole, wrapper_of
from moesaic.blueprint.shape import COPIES
from moesaic.checkpoint.reader import Headers, has_weights, missing_config, read_json, refuse_adapter
from moesaic.checkpoint.source import check_file, described_folder
from moesaic.checkpoint.text_model import text_config
from moesaic.errors import InputError
from moesaic.jobs import forecast, pace
from moesaic.jobs.request import (
    Outline,
    check_options,
    check_split,
    check_stored,
    kept_whole,
    outline_of,
)
from moesaic.jobs.settings import ConvertSettings
from moesaic.options import build
from moesaic.options.memory import free_memory
from moesaic.paths import cache_folder
from moesaic.targets import AUTO, OWN, TARGETS
from moesaic.targets.backbone import no_backbone
from moesaic.targets.base import TargetOptions
from moesaic.targets.config import aligned

if TYPE_CHECKING:
    from moesaic.blueprint.shape import FFNShape
    from moesaic.gguf_input.model import GGUFModel

_TOKENIZER_GROWTH = 2
"""Size of tokenizer.json over that of the GGUF's metadata which it is made from, as with SmolLM2's."""
GPU_SIZES = (24, 80, 141)
"""Memory of common GPUs, GB."""
ALIGNMENTS = {32: "GGUF q4_0 and q8_0", 64: "GPU kernels", 256: "GGUF K-quants"}


@dataclass(frozen=True)
class PlanReport:
    """The forecast. Sizes in neurons, parameters or bytes as named.

    ``operations``: multiplications and additions. ``seconds`` and ``peak_bytes`` are estimates. ``mapped_bytes``: pages
    of the checkpoint's files, which come on top of ``peak_bytes`` where there is room and which the system drops where
    there is none. ``output_bytes`` are for the architecture ``target``, ``staging_bytes`` what the unfinished folder
    holds beside them. ``device_bytes``: of a GPU, where layers and solvers compute there. Routers that are copies of
    the weights have ``router_bits`` and 0 ``router_parameters``; with ``int8`` they are the high half of the weights.
    """

    family: str
    model_type: str
    layers: int
    converted_layers: int
    d_model: int
    d_ff: int
    gated: bool
    method: str
    layout: str | None
    shared_width: int
    expert_width: int
    varied_widths: bool
    experts: int
    top_k: int
    padding_per_layer: int
    active_ffn_fraction: float
    ffn_parameters: int
    active_ffn_parameters: int
    router_parameters: int
    router_bytes: int
    router_bits: int
    int8: bool
    operations: float
    seconds: float
    peak_bytes: int
    mapped_bytes: int
    device_bytes: int
    target: str
    output_bytes: int
    staging_bytes: int
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"remarks": list(self.remarks)}


@dataclass(frozen=True)
class _Described:
    """A model as ``plan`` sees it: its config.json, and the header of the GGUF or the kind of wrapper that it is in."""

    config: dict[str, Any]
    gguf: GGUFModel | None = None
    wrapper: Whole | None = None

    def source(self, folder: Path, anatomy: Anatomy) -> forecast.Source:
        if self.gguf is None:
            return forecast.guess_source(folder, anatomy)
        tied = bool(self.config["tie_word_embeddings"])
        beside = _TOKENIZER_GROWTH * self.gguf.header.tokenizer_bytes
        return forecast.Source(self.gguf.nbytes, self.gguf.element, tied, 0, beside)

    def remarks(self, *, whole: bool) -> tuple[str, ...]:
        if self.wrapper is not None:
            rest = "carried unchanged" if whole else "left out, but for --whole"
            return (f"converted is the text model of this {self.wrapper.model_type} checkpoint; all else is {rest}",)
        if self.gguf is None:
            return ()
        size = f"{self.gguf.nbytes / 1e9:.2f} GB"
        return (f"the GGUF is dequantised first, once: {size} as {self.gguf.dtype} in {cache_folder()}",)


def _describe(model: str | Path) -> _Described:
    """A local model without its weights. Raises InputError when there is none, and as a GGUF's header is refused."""
    try:
        path = Path(model).expanduser()
        if path.is_file():
            from moesaic.gguf_input.model import read_model

            check_file(path)
            gguf = read_model(path)
            return _Described(gguf.config, gguf)
        refuse_adapter(path)
        if path.is_dir() and not (path / "config.json").is_file():
            raise missing_config(path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot read {str(model)!r}: {error}", "check the path, and who may read it") from error
    config = _read_config(path / "config.json")
    if wrapper_of(config):
        return _Described(text_config(config), wrapper=Whole(config, {}, ()))
    return _Described(config)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        hint = "give the folder of a Hugging Face checkpoint, a .gguf or a hub id"
        raise InputError(f"{path} does not exist", hint)
    return read_json(path)


def plan(model: str | Path, settings: ConvertSettings | Mapping[str, Any] | None = None, **values: Any) -> PlanReport:
    """Forecast ``convert(model, ..., settings)``.

    Args:
        model: A checkpoint folder; a GGUF, of which only the header is read; or a hub id, of which only config.json is
            fetched.
        settings: The conversion; or its fields as ``values``.

    Raises:
        InputError, UnsupportedModelError: for what ``convert`` would refuse, as far as config.json and the headers of
            the weights show it.
    """
    if not isinstance(settings, ConvertSettings):
        settings = build(ConvertSettings, {**(settings or {}), **values}, "settings")
    config = check_options(settings)
    folder = described_folder(str(model))
    described = _describe(folder)
    anatomy = read_anatomy(described.config, hierarchical=settings.hierarchical)
    outline = outline_of(settings, config, anatomy, kept_whole(settings, described.wrapper, anatomy))
    if described.gguf is None and has_weights(folder):
        check_stored(Headers(folder), outline)
    else:
        check_split(outline)
    source = described.source(folder, anatomy)
    memory = forecast.memory(outline, source)
    tokens = settings.calibration.tokens if outline.reads_text else 0
    space = forecast.disk(outline.split, outline.target, settings.target_options, source, tokens)
    shape, layout = outline.shape, config.own_layout
    sites = [site for site in anatomy.sites if site.path in outline.split.shapes]
    per_neuron = (3 if anatomy.gated else 2) * anatomy.d_model
    total = outline.ffn_parameters
    converted = sum(site.d_ff for site in sites) * per_neuron
    fraction = outline.active_fraction
    time = pace.forecast(outline)
    return PlanReport(
        family=anatomy.family.name,
        model_type=str(anatomy.config.get("model_type")),
        layers=anatomy.num_layers,
        converted_layers=len({site.layer for site in sites}),
        d_model=anatomy.d_model,
        d_ff=shape.d_ff,
        gated=anatomy.gated,
        method=settings.method,
        layout=None if layout is None else str(layout),
        shared_width=shape.shared,
        expert_width=shape.width,
        varied_widths=shape.varied,
        experts=shape.experts,
        top_k=shape.top_k,
        padding_per_layer=shape.padding,
        active_ffn_fraction=fraction,
        ffn_parameters=total,
        active_ffn_parameters=round(total - converted * (1 - fraction)),
        router_parameters=len(sites) * shape.router_parameters(anatomy.d_model, gated=anatomy.gated),
        router_bytes=len(sites) * shape.router_bytes(anatomy.d_model, gated=anatomy.gated),
        router_bits=shape.bits if shape.router in COPIES else 0,
        int8=shape.int8,
        operations=time.operations,
        seconds=time.seconds,
        peak_bytes=memory.private,
        mapped_bytes=memory.mapped,
        device_bytes=memory.device,
        target=space.target,
        output_bytes=space.output,
        staging_bytes=space.staging,
        remarks=(
            *_remarks(_common_width(shape), shape.padding),
            *_alignment_remarks(_common_width(shape), shape, settings.target_options.align, anatomy.d_model),
            *_router_remarks(shape, anatomy, source),
            _target_remark(outline),
            *_allocation_remarks(outline),
            *(
                ()
                if outline.reads_text
                else settings.calibration.no_effect(f"{settings.method} reads no text as it is set")
            ),
            *_size_remarks(memory, space),
            _room_remark(settings, memory),
            _device_remark(memory),
            *([f"the time is corrected by how long {settings.method} took here before"] if time.corrected else []),
            *described.remarks(whole=settings.whole),
        ),
    )


def _allocation_remarks(outline: Outline) -> tuple[str, ...]:
    settings = outline.settings
    if settings.allocation is None:
        return ()
    what = {
        "leading": "how many leading layers stay dense",
        "any": "which layers stay dense",
        "widths": "how many neurons each layer uses",
    }[settings.allocation.mode_for(settings.target)]
    at = " and ".join(f"{fraction:.1%}" for fraction in outline.cut_fractions)
    return (
        f"{what} is measured first, each layer cut alone to {at} of its neurons; the figures here are for equal "
        "layers, and the total active size is the same",
    )


def _size_remarks(memory: forecast.MemoryForecast, space: forecast.DiskForecast) -> tuple[str, str]:
    return (
        f"disk: {space.output / 1e9:.2f} GB as {space.target}, and {space.staging / 1e9:.2f} GB while it is made",
        f"the memory is without the {memory.mapped / 1e9:.2f} GB of mapped weights, which the system drops when it "
        "needs room",
    )


def _room_remark(settings: ConvertSettings, memory: forecast.MemoryForecast) -> str:
    """Whether the memory is there."""
    room = settings.allowed_bytes or free_memory()
    if room is None:
        return "how much memory is free is not known here"
    fits = "enough" if memory.private <= room else "too little, so that convert refuses it"
    return f"{room / 1e9:.1f} GB of memory are {'free' if settings.memory is None else 'allowed'}: {fits}"


def _device_remark(memory: forecast.MemoryForecast) -> str:
    """Which GPUs the work fits on; `doctor` says what is here, as finding one takes longer than all of this."""
    sizes = [size for size in GPU_SIZES if memory.device <= 1e9 * size]
    fits = f"one of {sizes[0]} GB is enough" if sizes else f"more than one of {GPU_SIZES[-1]} GB has"
    return f"with --device, a GPU needs about {memory.device / 1e9:.1f} GB: {fits}"


def _router_remarks(shape: FFNShape, anatomy: Anatomy, source: forecast.Source) -> tuple[str, ...]:
    """What a token reads of an FFN whose router is a copy of its weights, beside the dense FFN."""
    if shape.router != "low_bit":
        return ()
    dense = shape.d_ff * (3 if anatomy.gated else 2) * anatomy.d_model * source.element
    router = shape.router_bytes(anatomy.d_model, gated=anatomy.gated) / dense
    if shape.int8:
        rest = shape.rest_bytes(anatomy.d_model, gated=anatomy.gated) / dense
        return (
            f"a token reads {router + rest * shape.active / shape.d_ff:.3f} of an FFN's bytes, {router:.3f} of them "
            f"high halves; all int8 weights are {router + rest:.3f}, and the dense model cannot be had back",
        )
    return (
        f"a token reads {router + shape.active / shape.d_ff:.3f} of an FFN's bytes, {router:.3f} of them the router of "
        f"{shape.bits} bits; a prompt is computed by the dense FFN",
    )


def _common_width(shape: FFNShape) -> int:
    """That of the experts, 0 where they have none."""
    return 0 if shape.varied or shape.router == "low_bit" else shape.width


def _alignment_remarks(width: int, shape: FFNShape, align: int, d_model: int) -> tuple[str, ...]:
    """What an alignment that was asked for costs, and where it cannot help."""
    if not width or align <= TargetOptions().align:
        return ()
    remarks = []
    if wider := aligned(width, align) - width:
        share = shape.top_k * wider / shape.active
        remarks.append(
            f"a stock architecture pads each expert by {wider} neurons of zeros to a multiple of {align}: a token "
            f"computes {share:.0%} more; another layout or fewer experts may need none"
        )
    if align % 256 == 0 and d_model % 256:
        remarks.append(
            f"the model's width {d_model} is no multiple of 256: of the FFNs only the down projections become K-quants "
            "in a GGUF, the other matrices take the type of 32 values that llama.cpp falls back on"
        )
    return tuple(remarks)


def _remarks(width: int, padding: int) -> tuple[str, ...]:
    """About the common width of the experts, 0 where they have none."""
    remarks = []
    if width:
        missing = [f"{n} ({why})" for n, why in ALIGNMENTS.items() if width % n]
        if missing:
            remarks.append(f"expert width {width} is not a multiple of {', '.join(missing)}")
    if padding:
        remarks.append(f"{padding} padding neurons per layer, because the experts are not all as wide")
    return tuple(remarks)


def _target_remark(outline: Outline) -> str:
    """Which architecture the output will have, and what loads it, as far as the config shows it."""
    shape, asked = outline.shape, outline.settings.target
    loads = "the moesaic architecture: transformers loads it after `moesaic.register()`, or with trust_remote_code=True"
    if asked not in (AUTO, OWN):
        return f"written as {asked}, for {', '.join(TARGETS[asked].engines)}"
    if asked == OWN:
        return f"written in {loads}"
    if reason := no_backbone(outline.anatomy):
        return f"written in {loads}; {reason}"
    if outline.config.prunes_attention:
        return f"written in {loads}; no stock architecture has pruned attention"
    if shape.router == "static" and shape.experts:
        return f"written in {loads}; --target dense writes the same function for any engine"
    if shape.router == "low_bit":
        return f"written in {loads}; no stock architecture has single neurons as experts"
    if shape.varied:
        return f"written in {loads}; for a stock architecture, with a copy per expert, add --set widths=equal"
    if shape.union is not None:
        return f"written in {loads}; a stock architecture that is named gets a copy per expert"
    if shape.router == "gated" or shape.normalised:
        return f"written in {loads}; --router oracle makes it one that stock engines load"
    if outline.target == OWN:
        return f"written in {loads}; why no other: `moesaic targets MODEL`, or its routers only approach weights of 1"
    return f"written as {outline.target} where attention and norms fit, see `moesaic targets MODEL`"
