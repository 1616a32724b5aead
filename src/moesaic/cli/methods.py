"""``moesaic methods [NAME]``: the methods, and the options of one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import emit, emit_json, table


def attach(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(name="methods")(run)


def run(
    name: Annotated[str | None, typer.Argument(help="A method, for its options.")] = None, as_json: opt.AsJson = False
) -> None:
    """List the methods, or the options of one of them."""
    from moesaic.methods import METHODS, get_config
    from moesaic.options import settable

    if name is None:
        if as_json:
            emit_json(METHODS)
        else:
            emit(table(["method", "what it does"], [[key, text] for key, text in METHODS.items()], align="<<"))
        return
    config = get_config(name)
    if as_json:
        emit_json(config.model_json_schema())
        return
    emit(f"{name}: {METHODS[name]}")
    emit("")
    for key, info in settable(config):
        emit(f"  --set {key}={_shown(config(), key)}")
        emit(f"        {info.description or ''}")


def _shown(defaults: Any, key: str) -> str:
    """The default of a dotted option, as ``--set`` reads it."""
    for part in key.split("."):
        defaults = getattr(defaults, part)
    return "null" if defaults is None else str(defaults)
