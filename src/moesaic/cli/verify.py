"""``moesaic verify OUT``: is this folder what was written, and does it compute what it should?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import emit, emit_json, quiet_libraries


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="verify")(run)


def run(
    folder: opt.Folder,
    baseline: Annotated[Path | None, typer.Option("--baseline", help="The dense model, for parity of logits.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Check hashes, shapes, finiteness and, with --baseline, parity. Exit code 3 when anything is wrong."""
    quiet_libraries()
    from moesaic.jobs.verify import verify_output

    report = verify_output(folder, baseline=baseline)
    if as_json:
        emit_json(report.to_dict())
        return
    for key, value in report.to_dict().items():
        emit(f"{key:20} {value}")
    emit("ok")
