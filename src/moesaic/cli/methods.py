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

    if name is None:
        if as_json:
            emit_json(METHODS)
        else:
            emit(table(["method", "what it does"], [[key, text] for key, text in METHODS.items()]))
        return
    fields: dict[str, Any] = get_config(name).model_fields
    if as_json:
        emit_json(get_config(name).model_json_schema())
        return
    emit(f"{name}: {METHODS[name]}")
    emit("")
    for key, info in fields.items():
        emit(f"  --set {key}={info.get_default(call_default_factory=True)!s}")
        emit(f"        {info.description or ''}")
