"""``moesaic report OUT``: the page of an output; of several outputs, one page that compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import ConsoleProgress, emit, quiet_libraries, say

_OPEN = "open it in a browser; it needs no network"


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="report")(run)


def run(
    folders: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Folders that `moesaic convert` wrote.")],
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="The dense model: adds each layer's error and the dense model's losses."),
    ] = None,
    sample: Annotated[
        Path | None, typer.Option("--sample", help="UTF-8 text whose tokens are shown. Default: a short one, shipped.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Read the sample text again.")] = False,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="File to write. Default: OUT/report.html; of several, moesaic-report.html here."),
    ] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Write one HTML page of what is known of a converted model.

    It needs no network. Of several models, the page compares them.
    """
    opt.check_models(*folders, baseline)
    quiet_libraries(quiet)
    from moesaic.jobs.compare import compare_outputs
    from moesaic.jobs.report import report

    progress = ConsoleProgress(quiet)
    if len(folders) == 1:
        emit(str(report(folders[0], baseline=baseline, sample=sample, again=again, to=to, progress=progress)))
        if not quiet:
            say(_OPEN)
        return
    for folder in folders:
        report(folder, baseline=baseline, sample=sample, again=again, progress=progress)
    page = Path("moesaic-report.html") if to is None else to
    compare_outputs(folders, page)
    emit(str(page))
    if not quiet:
        say(_OPEN)
