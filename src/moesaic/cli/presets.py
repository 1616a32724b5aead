"""``moesaic presets [NAME]``: settings that ship with moesaic, the papers' own and those of the published figures."""

from __future__ import annotations

from typing import Annotated

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import emit, emit_json, table


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="presets")(run)


def run(
    name: Annotated[str | None, typer.Argument(help="A preset, for its settings.")] = None, as_json: opt.AsJson = False
) -> None:
    """List the presets, or show the settings of one of them.

    `moesaic convert MODEL OUT --preset NAME` takes it.
    """
    from moesaic.jobs.recipes import recipe, recipe_names, summary

    if name is None:
        found = {known: summary(known) for known in recipe_names()}
        emit_json(found) if as_json else emit(table(["preset", "what it is"], [*found.items()], align="<<"))
        return
    settings = recipe(name)
    if as_json:
        emit_json(settings)
        return
    import yaml

    emit(f"# {summary(name)}")
    emit(yaml.safe_dump(settings, sort_keys=False).rstrip())
