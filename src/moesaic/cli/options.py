"""Options that several verbs share, and how they become :class:`moesaic.jobs.settings.ConvertSettings`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.adjust.allocation_config import MODES
from moesaic.blueprint.layout import Layout
from moesaic.errors import InputError
from moesaic.methods import get_config
from moesaic.options import build, put, refuse_studies

if TYPE_CHECKING:
    from pydantic import BaseModel

    from moesaic.jobs.settings import ConvertSettings

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, .gguf file or hub id.")]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `moesaic convert` wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file with settings; flags override it.")]
Preset = Annotated[str | None, typer.Option("--preset", help="Settings that ship with moesaic, see `moesaic presets`.")]
Method = Annotated[
    str | None,
    typer.Option("--method", "-m", help="Method, see `moesaic methods`. Default: the one that lost least, by target."),
]
LayoutText = Annotated[
    str | None, typer.Option("--layout", help="SxAyEz: x shared, y active routed, z units in all. E.g. S3A3E8.")
]
Active = Annotated[
    float | None, typer.Option("--active", help="Fraction of the FFN neurons that a token uses, in place of --layout.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of the method; repeatable. See `moesaic methods NAME`."),
]
Calib = Annotated[
    list[str] | None,
    typer.Option(
        "--calib",
        metavar="SOURCE",
        help="Calibration text: wikitext, c4, code, wiki, tiny, mix, a text file, a folder, or records (.jsonl, .json, "
        ".csv, .tsv, .parquet) of text or chat messages. SOURCE:FIELD names their field, SOURCE=WEIGHT mixes. "
        "Repeatable.",
    ),
]
CalibTokens = Annotated[int | None, typer.Option("--calib-tokens", help="Calibration tokens.")]
CalibWindow = Annotated[int | None, typer.Option("--calib-window", help="Tokens per calibration window.")]
DenseLayers = Annotated[
    str | None,
    typer.Option(
        "--dense-layers",
        help="Layers to leave dense, e.g. 0,1,-1. auto, leading, any or widths: share the active neurons out by what "
        "each layer loses, at the same total.",
    ),
]
Hierarchical = Annotated[
    bool | None, typer.Option("--hierarchical", help="Convert the experts of a model that is MoE already.")
]
RouterText = Annotated[
    str | None,
    typer.Option(
        "--router",
        help="Linear router in place of the method's own: oracle (the experts that do most) or decisions (imitates).",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        help="With --blueprint: the fraction of the FFN neurons that text like --calib may use, where the experts have "
        "widths of their own or are single neurons.",
    ),
]
Target = Annotated[
    str | None, typer.Option("--target", help="Architecture to write, see `moesaic targets`. Default: auto.")
]
Whole = Annotated[
    bool | None,
    typer.Option(
        "--whole",
        help="Of a multimodal checkpoint: convert the text model in place and carry all else unchanged. Without, the "
        "output is the text model alone.",
    ),
]
Align = Annotated[
    int | None,
    typer.Option(
        "--align",
        help="Widths of experts in stock architectures are multiples of this: 64 for GPU kernels, 32 for q4_0 and q8_0 "
        "in a GGUF, 256 for its K-quants. Planned so where the method can, else padded with zeros; `plan` says which.",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of calibration windows and of the method.")]
Memory = Annotated[
    str | None,
    typer.Option("--memory", help="Memory that it may take of its own, such as 8GB. Default: what is free."),
]
DeviceName = Annotated[
    str | None,
    typer.Option("--device", help="Where it computes: auto (a GPU where there is one), cpu, cuda, cuda:1, xpu, mps."),
]


def make_settings(
    *,
    config: Path | None,
    preset: str | None = None,
    method: str | None,
    layout: str | None,
    active: float | None,
    options: list[str] | None,
    calib: list[str] | None,
    calib_tokens: int | None,
    calib_window: int | None,
    dense_layers: str | None,
    hierarchical: bool | None,
    seed: int | None,
    router: str | None,
    target: str | None,
    budget: float | None = None,
    whole: bool | None = None,
    device: str | None = None,
    align: int | None = None,
    memory: str | None = None,
) -> ConvertSettings:
    """Flags over the YAML file or preset over the defaults.

    Raises InputError for unknown keys and values that do not parse.
    """
    from moesaic.jobs.settings import ConvertSettings

    values = _file(config, preset)
    if layout is not None and active is not None:
        raise InputError("both --layout and --active are given", "give one of them")
    names = {name.partition(".")[0] for name in pairs(options)} | ({"layout"} if layout is not None else set())
    named = {name: value for name, value in (("method", method), ("target", target)) if value is not None}
    chosen = _method(values | named, names, router=router is not None)
    method_options = with_pairs(
        _section(values, "options"), options, get_config(chosen), f"method {chosen}", "options={} of moesaic.convert"
    )
    if layout is not None:
        method_options["layout"] = str(Layout.parse(layout))
    if active is not None:
        method_options |= _active(chosen, active)
    if align is not None:
        values["target_options"] = _section(values, "target_options") | {"align": align}
        if "align" in get_config(chosen).model_fields:
            method_options["align"] = align
    calibration = _section(values, "calibration")
    given = {"sources": calib, "tokens": calib_tokens, "window": calib_window, "seed": seed}
    calibration |= {key: value for key, value in given.items() if value is not None}
    flags: dict[str, Any] = {"method": method, "hierarchical": hierarchical, "seed": seed, "target": target}
    flags |= {"budget": budget, "whole": whole, "device": device, "memory": memory}
    if router is not None:  # --router gives the mode, the file may give the rest
        settings = values.get("router")
        flags["router"] = (settings if isinstance(settings, dict) else {}) | {"mode": router}
    if dense_layers is not None:  # either form replaces what the file says
        name, value = ("allocation", dense_layers) if dense_layers in MODES else ("dense_layers", _layers(dense_layers))
        values = {key: entry for key, entry in values.items() if key not in ("allocation", "dense_layers")}
        flags[name] = value
    values |= {key: value for key, value in flags.items() if value is not None}
    return build(ConvertSettings, values | {"options": method_options, "calibration": calibration}, "settings")


def _file(config: Path | None, preset: str | None) -> dict[str, Any]:
    from moesaic.jobs.recipes import recipe
    from moesaic.jobs.settings import load_settings

    if config is not None and preset is not None:
        raise InputError("both --config and --preset are given", "give one of them")
    if preset is not None:
        return recipe(preset)
    return {} if config is None else load_settings(config)


def _method(values: dict[str, Any], names: set[str], *, router: bool) -> str:
    """The method whose options the flags set: the one that is named, or that the settings will choose.

    ``names``: of options that flags give; ``router``: whether they ask for a linear one.
    """
    from moesaic.jobs.choice import UNNAMED, choose_method

    named = str(values.get("method") or UNNAMED)
    if named != UNNAMED:
        return named
    names = names | _section(values, "options").keys()
    target = str(values.get("target") or UNNAMED)
    return choose_method(target, names, router=router or values.get("router") is not None).method


def _active(method: str, fraction: float) -> dict[str, Any]:
    """The method's own option of that name, or the layout of eight units for one that has none."""
    if get_config(method).has_active:
        return {"active": fraction}
    layout = Layout.from_active_fraction(fraction)
    if layout.active_fraction != fraction:
        raise InputError(
            f"method {method} has units, and {fraction:g} is no number of eighths",
            f"the nearest layout of eight is {layout}; or give a --layout of more units",
        )
    return {"layout": str(layout)}


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise InputError(f"settings: {name} holds no mapping", "write `key: value` lines below it")
    return dict(section)


def with_pairs(
    values: dict[str, Any], options: list[str] | None, model: type[BaseModel], what: str, how: str
) -> dict[str, Any]:
    """What a settings file gives for ``model``, with ``--set`` over it; ``what`` and ``how`` as in refuse_studies."""
    given = pairs(options)
    nested: dict[str, Any] = {}
    for name, value in given.items():
        put(nested, name, value)
    refuse_studies(model, nested, what, how)
    merged = copy.deepcopy(values)
    for name, value in given.items():
        put(merged, name, value)
    return merged


def pairs(options: list[str] | None) -> dict[str, Any]:
    """``["fade_max=0.4"]`` -> ``{"fade_max": 0.4}``; values are read as YAML."""
    import yaml

    found = {}
    for option in options or []:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise InputError(f"cannot read --set {option!r}", "write --set key=value")
        try:
            found[key.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"cannot read the value of --set {option!r}", "quote it as in YAML") from error
    return found


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"cannot read --dense-layers {text!r}", "write e.g. --dense-layers 0,1,-1, or auto") from error


def check_models(*models: str | Path | None) -> None:
    """Refuse a folder that holds no model, before torch is imported. Of names that are no paths, only folders count:
    GGUFs and hub ids are left to who reads them."""
    from moesaic.checkpoint.reader import Checkpoint

    for model in models:
        if isinstance(model, Path) or (model is not None and Path(model).is_dir()):
            Checkpoint(Path(model).expanduser())
