"""``moesaic undo OUT DENSE``: the dense checkpoint back from a partition, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import emit, quiet_libraries


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="undo")(run)


def run(
    folder: opt.Folder,
    dense: Annotated[Path, typer.Argument(metavar="DENSE", help="Folder to create.")],
    restart: Annotated[bool, typer.Option("--restart", help="Throw away an unfinished run of another undo.")] = False,
) -> None:
    """Give the dense checkpoint back, tensor for tensor.

    OUT must be a conversion that lost nothing.
    """
    opt.check_models(folder)
    quiet_libraries()
    from moesaic.jobs.undo import undo

    undo(folder, dense, restart=restart)
    emit(f"{dense}: the dense model that {folder} was made from")
