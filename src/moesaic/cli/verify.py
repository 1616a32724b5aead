"""``moesaic verify OUT``: is this folder what was written, and does it compute what it should?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import emit, emit_json, native_line, quiet_libraries


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="verify")(run)


def run(
    folder: opt.Folder,
    baseline: Annotated[Path | None, typer.Option("--baseline", help="The dense model, for parity of logits.")] = None,
    parity: Annotated[
        bool,
        typer.Option("--parity", help="A stock architecture: logits in stock transformers too, into OUT/results.json."),
    ] = False,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of 256 tokens for --parity.")] = 4,
    as_json: opt.AsJson = False,
) -> None:
    """Check hashes, shapes, finiteness and, with --baseline, parity. Exit code 3 when anything is wrong."""
    quiet_libraries()
    from moesaic.jobs.verify import verify_output

    report = verify_output(folder, baseline=baseline).to_dict()
    native = None
    if parity:
        from moesaic.evaluate.run import merge_results
        from moesaic.jobs.native import verify_native

        native = verify_native(folder, baseline, windows=windows).to_dict()
        merge_results(folder, {"native_parity": native})
    if as_json:
        emit_json(report | ({"native_parity": native} if native else {}))
        return
    for key, value in report.items():
        emit(f"{key:20} {value}")
    if native:
        emit(native_line(native))
    emit("ok")
