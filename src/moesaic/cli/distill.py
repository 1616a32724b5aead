"""``moesaic distill MODEL``: is there a sparse mixture of experts inside one FFN?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import ConsoleProgress, emit, emit_json, quiet_libraries, table
from moesaic.errors import InputError
from moesaic.options.device import AUTO


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="distill")(run)


def run(
    model: opt.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create; it appears when complete.")],
    layer: Annotated[int, typer.Option("--layer", help="Decoder layer, from 0; negative counts from the end.")],
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
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting, e.g. pairs='[[8,8],[32,32]]', epochs=4; repeatable. See docs/methods/secret_moe.md.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="Students trained at a time. Default: one per processor.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away an unfinished sweep.")] = False,
    device: opt.DeviceName = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train small students of one FFN, dense and sparse.

    They are trained on its real inputs and on a Gaussian twin, and compared.

    The sparse ones have many experts of one neuron and a shared network (arXiv 2512.18452). Interrupted, the same
    command resumes.
    """
    from moesaic.distill.config import DistillConfig
    from moesaic.jobs.distill_request import check_distill
    from moesaic.jobs.settings import load_settings
    from moesaic.options import build

    values = load_settings(config) if config is not None else {}
    values = opt.with_pairs(values, options, DistillConfig, "distill", "config={} of moesaic.jobs.distill.distill")
    if seed is not None:
        values["seed"] = seed
    text = {"sources": data, "tokens": tokens, "window": window, "seed": seed}
    if given := {key: value for key, value in text.items() if value is not None}:
        section = values.get("data", {})
        if not isinstance(section, dict):
            raise InputError("distill: data holds no mapping", "write e.g. --tokens 65536")
        values["data"] = {**section, **given}
    settings = build(DistillConfig, values, "distill")
    workers = processes if processes is not None else os.cpu_count() or 1
    check_distill(model, layer, settings, out, workers, restart)  # a slip is answered before torch is imported
    quiet_libraries(quiet)
    from moesaic.jobs.distill import distill

    progress = ConsoleProgress(quiet)
    done = distill(
        model,
        layer,
        out,
        config=settings,
        processes=workers,
        restart=restart,
        device=device or AUTO,
        progress=progress,
    )
    if as_json:
        emit_json({"output": str(done.output)} | {key: v for key, v in done.results.items() if key != "trials"})
        return
    emit(_summary(done.results))
    emit(f"report: {done.output / 'report.html'}")


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
