"""The reference of the command line and of the methods' options, written from the code itself as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main
from pydantic_core import PydanticUndefined

from moesaic.cli.main import app
from moesaic.methods import METHODS, get_config


def commands() -> dict[str, Any]:
    """The verbs, in the order of ``moesaic --help``: click's commands."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def cli_page() -> str:
    """Every verb with its arguments and options."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# Command line",
        "Written from the commands themselves; `moesaic VERB --help` says the same.",
        _words(group.help),
    ]
    for name, command in commands().items():
        arguments = [_metavar(parameter) for parameter in command.params if _is_argument(parameter)]
        usage = " ".join(["moesaic", name, *arguments, "[OPTIONS]"])
        parts += [f"## moesaic {name}", _words(command.help), f"    {usage}", _table(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def methods_page() -> str:
    """Every method with its options, as ``--set`` takes them."""
    parts = [
        "# Options of the methods",
        "`moesaic convert --set KEY=VALUE` sets one; `moesaic methods NAME` shows them. Written from the code.",
    ]
    for name, summary in METHODS.items():
        rows = "\n".join(_option_rows(get_config(name)))
        table = f"| option | default | what it does |\n|---|---|---|\n{rows}" if rows else "It has no options."
        parts += [f"## {name}", f"{_cell(str(summary))}.", table]
    return "\n\n".join(parts) + "\n"


def _option_rows(config: Any) -> Iterator[str]:
    for name, field in config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "needed" if default is PydanticUndefined else f"`{default}`"
        yield f"| `{name}` | {_cell(shown)} | {_cell(field.description or '')} |"


def _table(command: Any) -> str:
    rows = []
    for parameter in command.params:
        names = _metavar(parameter) if _is_argument(parameter) else ", ".join(parameter.opts + parameter.secondary_opts)
        rows.append(f"| `{names}` | {_cell(_words(getattr(parameter, 'help', None)))} |")
    return "| | |\n|---|---|\n" + "\n".join(rows) if rows else ""


def _is_argument(parameter: Any) -> bool:
    return parameter.param_type_name == "argument"


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
