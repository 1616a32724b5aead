"""Result files: JSON with one row per line, so that a changed row is one changed line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moesaic.durable import replace_text


def read_lines(file: Path) -> list[dict[str, Any]]:
    """All lines of a .jsonl file, none where there is none; a last line that a crash cut short is left out."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def write_rows(file: Path, data: Any) -> None:
    """Write ``data`` as :func:`rows_text`, all of it or nothing; the folder is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, rows_text(data))


def rows_text(data: Any) -> str:
    """A list with one entry per line; or a mapping with one key per line, whose lists and mappings of rows do the same.

    A row is a list or a mapping itself. Everything inside a row stays on its line.
    """
    data = json.loads(json.dumps(data))  # tuples become lists and keys text, as a reader will find them
    if isinstance(data, dict):
        lines = [
            f"{json.dumps(key)}: {_opened(value) if _holds_rows(value) else json.dumps(value)}"
            for key, value in data.items()
        ]
        return "{\n" + ",\n".join(lines) + "\n}\n"
    return f"{_opened(data)}\n"


def _holds_rows(value: Any) -> bool:
    if not isinstance(value, list | dict):
        return False
    members = value if isinstance(value, list) else list(value.values())
    return bool(members) and all(isinstance(member, list | dict) for member in members)


def _opened(value: Any) -> str:
    if not value:
        return json.dumps(value)
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(member)}" for key, member in value.items()) + "\n}"
    return "[\n" + ",\n".join(json.dumps(member) for member in value) + "\n]"
