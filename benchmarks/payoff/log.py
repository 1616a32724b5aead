"""The log of a model: a line of JSON per finished measurement. What is there is not measured again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import cpu_name

from moesaic.durable import append_line, replace_text

_PACKAGES = ("torch", "transformers", "xllamacpp")


@cache
def machine() -> str:
    """Where and with what something was measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"{cpu_name()}; Python {platform.python_version()}, {packages}"


class Log:
    """Lines of one file. A last line that a crash cut short is dropped."""

    def __init__(self, file: Path) -> None:
        self.file = file
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if "".join(whole) != text:
            replace_text(file, "".join(whole))
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in whole]

    def add(self, line: Mapping[str, Any]) -> None:
        """Append one measurement."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.file, json.dumps(line))
        self.lines.append(dict(line))

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The last line that has all of these."""
        found = self.all(**wanted)
        return found[-1] if found else None

    def all(self, **wanted: Any) -> Sequence[dict[str, Any]]:
        """All lines that have all of these, in the order of the file."""
        return [line for line in self.lines if all(line.get(key) == value for key, value in wanted.items())]
