"""What an unfinished output depends on, and whether a run may go on with it. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.errors import InputError


def read_key(path: Path) -> dict[str, Any]:
    """The key in a file. Raises InputError when it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged", "start over with --restart") from error


def compare_keys(partial: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to resume when anything that the output depends on has changed."""
    changes = _changes(old, new)
    if changes:
        raise InputError(
            f"{partial.name} is an unfinished output of another run: {'; '.join(changes[:3])}",
            "give the same model and settings to resume it, or start over with --restart",
        )


def _changes(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(old.keys() | new.keys())
        return [
            change for key in keys for change in _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name} was {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}...{text[-4:]}"
