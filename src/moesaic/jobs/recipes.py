"""Settings files that ship with moesaic: the papers' own settings, and those of the published figures. No torch here.

A recipe is a file of ``moesaic/recipes`` that ``--config`` would read as well. Its first line is a comment that says
what it is.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from moesaic.errors import InputError
from moesaic.jobs.settings import load_settings

_FOLDER = "recipes"
_ENDING = ".yaml"


def recipe_names() -> list[str]:
    """All recipes, in the order of their names."""
    return sorted(file.name.removesuffix(_ENDING) for file in (files("moesaic") / _FOLDER).iterdir() if _is(file.name))


def recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe. Raises InputError, listing the names, for an unknown one."""
    return load_settings(_path(name))


def summary(name: str) -> str:
    """What a recipe is, in a line."""
    return _path(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _is(name: str) -> bool:
    return name.endswith(_ENDING)


def _path(name: str) -> Path:
    if name not in recipe_names():
        raise InputError(f"unknown preset {name!r}", f"known: {', '.join(recipe_names())}")
    return Path(str(files("moesaic") / _FOLDER / f"{name}{_ENDING}"))
