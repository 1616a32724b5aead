"""``moesaic targets [FOLDER]``: the architectures that can be written, and which of them hold a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import emit, emit_json, quiet_libraries, table


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="targets")(run)


def run(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="A dense model, or a folder that `moesaic convert` wrote: does it fit?"),
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """List the target architectures, and which of them hold a model."""
    from moesaic.targets import TARGETS, common_reasons

    if folder is None:
        if as_json:
            emit_json({name: {"summary": info.summary, "engines": info.engines} for name, info in TARGETS.items()})
        else:
            rows = [[name, ", ".join(info.engines), info.summary] for name, info in TARGETS.items()]
            emit(table(["target", "engines", "what it holds"], rows, align="<<<"))
        return
    quiet_libraries()
    from moesaic.jobs.native import fitting_targets

    fits = fitting_targets(folder)
    if as_json:
        emit_json(fits)
        return
    common = common_reasons(fits)
    for name, reasons in fits.items():
        emit(f"{name:17} {'yes' if not reasons else 'no'}")
        for reason in reasons:
            if reason not in common:
                emit(f"{'':17} {reason}")
    for reason in common:
        emit(f"no stock one      {reason}")
