"""``moesaic compare A B``: several conversions beside each other, as a table or a page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import WORKING, emit, emit_json, say, table
from moesaic.cli.pulse import PULSE


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="compare")(run)


def run(
    folders: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Two or more outputs of `moesaic convert`.")],
    page: Annotated[Path | None, typer.Option("--page", help="Also write the comparison as an HTML page.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Show how converted models differ.

    Options, cost, speed, and quality with intervals. Nothing is measured anew.
    """
    from moesaic.errors import InputError

    if len(folders) < 2:
        raise InputError("one folder has nothing to be compared with", "give two or more")
    opt.check_models(*folders)
    PULSE.watch(WORKING)
    from moesaic.jobs.compare import compare_outputs
    from moesaic.report.compare import comparison_rows, names_of

    compared = compare_outputs(folders, page)
    names = names_of(compared.models)
    rows = comparison_rows(compared.models, compared.paired)
    if as_json:
        emit_json({row[0].strip(): dict(zip(names, row[1:], strict=True)) for row in rows})
    else:
        emit(table(["", *names], rows, align="<" * (len(names) + 1)))
    for folder, facts in zip(folders, compared.models, strict=True):
        if not facts.evaluations:
            say(f"{folder} was not measured: moesaic eval {shlex.quote(str(folder))} --baseline MODEL")
    if page is not None:
        say(f"page: {page}")
