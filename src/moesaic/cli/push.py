"""``moesaic push OUT OWNER/NAME``: a converted model onto the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import ConsoleProgress, emit


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="push")(run)


def run(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A converted model's folder, or a .gguf file.")],
    repository: Annotated[
        str,
        typer.Argument(
            metavar="OWNER/NAME[@BRANCH]", help="Repository on the hub, public if it is new. Made if need be."
        ),
    ],
    quiet: opt.Quiet = False,
) -> None:
    """Send a converted model to the hub, with its card.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from moesaic.jobs.push import push

    emit(push(folder, repository, progress=ConsoleProgress(quiet)))
