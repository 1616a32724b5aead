"""``moesaic demo``: a real 135M model, end to end and offline: convert, evaluate, generate; one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import ConsoleProgress, emit, emit_json, quiet_libraries, table


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="demo")(run)


def run(
    out: Annotated[Path, typer.Option("--out", help="Folder for the converted models.")] = Path("moesaic-demo"),
    windows: Annotated[int, typer.Option("--windows", help="Evaluation windows of 1024 tokens.", min=1)] = 6,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Convert a small real model and measure it beside the dense one.

    SmolLM2-135M by the method that we recommend, at two budgets; CMoE and static pruning as comparison.
    """
    quiet_libraries(quiet)
    from moesaic.jobs.demo import demo

    result = demo(out, windows=windows, progress=ConsoleProgress(quiet))
    if as_json:
        emit_json(result.to_dict())
        return
    emit("")
    emit(f"SmolLM2-135M-Instruct, {result.protocol}, {result.machine}")
    emit("")
    rows = [
        [
            r.model,
            f"{r.active:.0%}",
            f"{r.perplexity:.2f}",
            f"{r.ratio:.3f}",
            f"{r.prefill:.0f}",
            f"{r.decode:.1f}",
            r.gain,
        ]
        for r in result.rows
    ]
    headers = ["model", "active FFN", "perplexity", "x dense", "prefill tok/s", "decode tok/s", "what it gains"]
    emit(table(headers, rows, align="<>>>>><"))
    emit("")
    emit(f"{result.spoken_by} says: {result.sentence}")
    emit(f"checkpoints: {', '.join(str(path) for path in result.outputs)} ({result.seconds:.0f} s in all)")
    emit(
        "plot: "
        + (str(result.plot) if result.plot else "none, as matplotlib is missing: pip install 'moesaic[report]'")
    )
    emit(f"next: moesaic chat {result.outputs[0]}")
