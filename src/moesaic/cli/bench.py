"""``moesaic bench OUT --baseline MODEL``: speed and memory beside the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import ConsoleProgress, emit, emit_json, quiet_libraries, table
from moesaic.errors import InputError


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="bench")(run)


def run(
    folder: opt.Folder,
    baseline: Annotated[str, typer.Option("--baseline", help="The dense model: a folder, .gguf or hub id.")],
    gguf: Annotated[
        Path | None, typer.Option("--gguf", help="Also llama.cpp: a GGUF of OUT. Needs --baseline-gguf.")
    ] = None,
    baseline_gguf: Annotated[Path | None, typer.Option("--baseline-gguf", help="A GGUF of the dense model.")] = None,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of a prompt.")] = 128,
    steps: Annotated[int, typer.Option("--steps", help="Tokens to decode after it.")] = 16,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds that count; one more warms up.")] = 3,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Sequences at a time; repeatable. Default: 1 and 8.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads. Default: torch's.")] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Weights in transformers: auto (as stored), bfloat16, float16, float32.")
    ] = "auto",
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure speed and memory of OUT beside the dense model.

    Prefill and decode, in turn and in one run.
    """
    if (gguf is None) != (baseline_gguf is None):
        raise InputError("llama.cpp compares two files", "give both --gguf and --baseline-gguf")
    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise InputError(f"unknown --dtype {dtype!r}", "auto, bfloat16, float16 or float32")
    for file in (gguf, baseline_gguf):
        if file is not None and not file.is_file():
            raise InputError(f"{file} does not exist", "moesaic export STOCK FILE --to gguf writes one")
    opt.check_models(folder, baseline)
    quiet_libraries(quiet)
    import torch

    from moesaic.checkpoint.source import resolve_model
    from moesaic.jobs.bench import BenchSettings, bench

    given = BenchSettings(prompt, steps, rounds, tuple(batch or (1, 8)), threads or torch.get_num_threads(), dtype)
    ggufs = None if gguf is None or baseline_gguf is None else (baseline_gguf, gguf)
    dense, own = resolve_model(baseline), resolve_model(str(folder))
    found = bench(own, dense, settings=given, ggufs=ggufs, progress=ConsoleProgress(quiet))
    emit_json(found) if as_json else emit(render(found))


def render(found: dict[str, Any]) -> str:
    """The figures as plain tables."""
    parts = [
        f"{found['settings']['threads']} threads, prompts of {found['settings']['prompt']} tokens; tokens per second, "
        "best / median; x dense: of the best / median within a turn"
    ]
    for engine, rows in found["engines"].items():
        cells = []
        for row in rows:
            figures = [f"{row[part]['best']:.1f} / {row[part]['median']:.1f}" for part in ("prefill", "decode")]
            ratios = ["{:.2f} / {:.2f}".format(*row[part]["times_dense"]) for part in ("prefill", "decode")]
            own = [figures[0], ratios[0], figures[1], ratios[1]]
            cells.append([row["model"], str(row["batch"]), f"{row['megabytes']:.0f}", *own])
        headers = ["model", "batch", "MB", "prefill", "x dense", "decode", "x dense"]
        parts += ["", engine, table(headers, cells)]
    return "\n".join(parts)
