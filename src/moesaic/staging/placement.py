"""Where an output may go: checks of paths and disk space that come before any work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moesaic.errors import InputError, ResourceError
from moesaic.staging.manifest import MANIFEST_NAME

_SPARE_BYTES = 64 * 2**20


def absolute(path: str | Path) -> Path:
    """The path with ``~``, ``..`` and links of its parents resolved; its own last part is kept, even if it is a link.

    Raises InputError for a path that cannot be one: empty text, an unknown user after ``~``, a zero byte.
    """
    try:
        if not str(path):
            raise ValueError("it is empty")
        full = Path(path).expanduser()
        resolved = full.resolve()
        return resolved if full.name in ("", "..") else full.parent.resolve() / full.name
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"path {str(path)!r} cannot be used: {error}", "choose another path") from error


def partial_of(out: Path) -> Path:
    """The staging folder beside an output."""
    return out.with_name(f"{out.name}.partial")


def check_output(out: Path, source: Path | None = None) -> None:
    """Refuse an output folder that exists, cannot be created, or overlaps with the model that is read.

    Both paths as :func:`absolute` gives them. Raises InputError.
    """
    if not out.name:
        raise InputError(f"{out} cannot be an output folder", "name a folder that does not exist yet")
    if source is not None:
        _check_overlap(out, source.resolve())
    if os.path.lexists(out):
        raise _exists(out)
    parent = out.parent
    if not parent.is_dir():
        reason = "is not a folder" if os.path.lexists(parent) else "does not exist"
        raise InputError(f"cannot create {out}: {parent} {reason}", "create the parent folder first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot create {out}: no permission to write in {parent}", "choose another output folder")


def _exists(out: Path) -> InputError:
    if out.is_symlink():
        return InputError(f"output {out} is a link", "name a folder that does not exist yet")
    if not out.is_dir():
        return InputError(f"output {out} exists and is a file", "name a folder that does not exist yet")
    if (out / MANIFEST_NAME).is_file():
        return InputError(f"output {out} exists and is complete", "choose another output folder or delete this one")
    return InputError(f"output {out} exists", "choose another output folder: it is created by moesaic")


def _check_overlap(out: Path, source: Path) -> None:
    place = out.resolve()
    if place == source:
        raise InputError(
            f"output {out} is the model itself", "choose another output folder, models are never overwritten"
        )
    if place.is_relative_to(source):
        raise InputError(f"output {out} lies inside the model folder {source}", "choose an output folder elsewhere")
    if source.is_relative_to(place):
        raise InputError(f"the model {source} lies inside the output {out}", "choose an output folder elsewhere")


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises ResourceError when the file system of ``folder`` cannot take ``needed_bytes`` and a little more."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > 0 and free < needed_bytes + _SPARE_BYTES:
        raise ResourceError(
            f"the output needs about {needed_bytes / 1e9:.1f} GB more, {folder} has {free / 1e9:.1f} GB free",
            "free some space or choose an output folder on another disk",
        )
