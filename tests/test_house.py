"""The structure of the code: a unit imports only units below it, so that there is no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import moesaic

ROOT = Path(moesaic.__file__).parent
ORDER = [
    "errors",
    "options",
    "progress",
    "paths",
    "durable",
    "blueprint",
    "nn",
    "serve",
    "solvers",
    "anatomy",
    "staging",
    "gguf_input",
    "checkpoint",
    "materialise",
    "calibration",
    "targets",
    "distill",
    "train",
    "methods",
    "adjust",
    "tune",
    "gguf",
    "evaluate",
    "report",
    "jobs",
    "cli",
]
"""The units, lowest first. docs/design.md says what each is for."""
ENTRY = {"__init__", "__main__"}
"""The public names and ``python -m moesaic``: they may import everything."""


def unit_of(path: Path) -> str:
    """The folder or file directly below the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_units(path: Path) -> Iterator[tuple[int, str]]:
    """Line and unit of every import of ours, also those inside functions and for the type checker."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names = [node.module]
            if node.module == "moesaic":
                names = [f"moesaic.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "moesaic" and len(parts) > 1:
                yield node.lineno, parts[1]


def test_every_unit_has_its_place() -> None:
    found = {unit_of(path) for path in ROOT.rglob("*.py")} - ENTRY
    assert found == set(ORDER)


@pytest.mark.parametrize("unit", ORDER)
def test_no_import_goes_up(unit: str) -> None:
    below = set(ORDER[: ORDER.index(unit) + 1])
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for path in ROOT.rglob("*.py")
        if unit_of(path) == unit
        for line, other in imported_units(path)
        if other not in below
    ]
    assert upward == []


def test_few_files_lie_at_the_top() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 6
