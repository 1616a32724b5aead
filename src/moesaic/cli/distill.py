"""``moesaic distill MODEL``: is there a sparse mixture of experts inside one FFN?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import ConsoleProgress, emit, emit_json, quiet_libraries, table
from moesaic.errors import InputError


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="distill")(run)


def run(
    model: opt.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create; it appears when complete.")],
    layer: Annotated[int, typer.Option("--layer", help="Decoder layer, from 0; negative counts from the end.")],
    active: Annotated[
        str | None, typer.Option("--active", help="Active neurons, half shared and half routed, e.g. 16,64,256.")
    ] = None,
    experts: Annotated[str | None, typer.Option("--experts", help="Numbers of experts, e.g. 1000,10000.")] = None,
    routers: Annotated[str | None, typer.Option("--routers", help="Of low_rank, full, product; comma between.")] = None,
    inits: Annotated[str | None, typer.Option("--inits", help="Of active, fan_in; comma between.")] = None,
    rates: Annotated[str | None, typer.Option("--rates", help="Learning rates, e.g. 3e-3,1e-2.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the training tokens.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="SOURCE", help="Text, as --calib of convert. Repeatable."),
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens to capture, for all three splits.")] = None,
    window: Annotated[int | None, typer.Option("--window", help="Tokens per window of text.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of text, students and twin.")] = None,
    config: opt.Config = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. pairs='[[0,64]]', probe=null; repeatable."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="Students trained at a time. Default: one per processor.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away an unfinished sweep.")] = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train small students of one FFN, dense and sparse, on its real inputs and on a Gaussian twin, and compare.

    The sparse ones have many experts of one neuron and a shared network (arXiv 2512.18452). Interrupted, the same
    command resumes.
    """
    from moesaic.distill.config import DistillConfig
    from moesaic.jobs.distill_request import check_distill
    from moesaic.jobs.settings import build, load_settings

    values = load_settings(config) if config is not None else {}
    values |= opt.pairs(options)
    if active is not None:
        width = values.get("width", 1)  # of an expert; whether it is one is seen with the other settings
        neurons = width if isinstance(width, int) and width > 0 else 1
        values["pairs"] = [_halves(a, neurons) for a in _numbers(active, "--active", int)]
    lists = {"experts": (experts, int), "routers": (routers, str), "inits": (inits, str), "rates": (rates, float)}
    for key, (text, kind) in lists.items():
        if text is not None:
            values[key] = _numbers(text, f"--{key}", kind)
    values |= {key: value for key, value in {"epochs": epochs, "seed": seed}.items() if value is not None}
    text = {"sources": data, "tokens": tokens, "window": window, "seed": seed}
    if given := {key: value for key, value in text.items() if value is not None}:
        section = values.get("data", {})
        if not isinstance(section, dict):
            raise InputError("distill: data holds no mapping", "write e.g. --tokens 65536")
        values["data"] = {**section, **given}
    settings = build(DistillConfig, values, "distill")
    workers = processes if processes is not None else os.cpu_count() or 1
    check_distill(model, layer, settings, out, workers, restart)  # a slip is answered before torch is imported
    quiet_libraries()
    from moesaic.jobs.distill import distill

    progress = ConsoleProgress(quiet)
    done = distill(model, layer, out, config=settings, processes=workers, restart=restart, progress=progress)
    if as_json:
        emit_json({"output": str(done.output)} | {key: v for key, v in done.results.items() if key != "trials"})
        return
    emit(_summary(done.results))
    emit(f"report: {done.output / 'report.html'}")


def _numbers(text: str, option: str, kind: type[int] | type[float] | type[str]) -> list[Any]:
    try:
        found = [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"cannot read {option} {text!r}", "write values with commas between") from error
    if not found:
        raise InputError(f"{option} is empty", "write values with commas between")
    return found


def _halves(active: int, width: int) -> list[int]:
    """``[h_s, k]`` with h_s = k w = A / 2, for experts of ``width`` neurons."""
    if active < 2 or active % (2 * width):
        what = "even numbers" if width == 1 else f"multiples of {2 * width}, twice the width of an expert"
        raise InputError(f"--active {active} has no two halves", f"give {what}, or --set pairs='[[0,16]]'")
    return [active // 2, active // 2 // width]


def _summary(results: dict[str, Any]) -> str:
    headers = (
        "student",
        "A",
        "h_s + k w",
        "FVU real",
        "gain",
        "FVU Gaussian",
        "gain",
        "router MACs",
        "FVU/dense at equal MACs",
    )
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in results["students"]:
        found.setdefault((row["family"], row["active"], row["spec"]["shared"]), {})[row["law"]] = row

    def cell(row: dict[str, Any] | None, key: str, form: str) -> str:
        return "-" if row is None or row.get(key) is None else format(row[key], form)

    rows = []
    for _, entry in sorted(found.items()):
        real, twin = entry.get("real"), entry.get("gaussian")
        first = next(iter(entry.values()))
        equal = (real or {}).get("equal_macs")
        rows.append(
            [
                first["family"],
                str(first["active"]),
                first["split"],
                cell(real, "fvu", ".4f"),
                cell(real, "gain", ".2f"),
                cell(twin, "fvu", ".4f"),
                cell(twin, "gain", ".2f"),
                str(first["router_macs"]),
                cell(equal, "ratio", ".2f"),
            ]
        )
    return table(headers, rows)
