"""``manifest.json``: which files an output consists of, their sha256, and what they were made from.

It has no timings and no dates: two runs of the same conversion write the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from moesaic.errors import VerificationError

MANIFEST_NAME = "manifest.json"
FORMAT = 1
UNHASHED = frozenset({MANIFEST_NAME, "results.json", "README.md", "report.html"})
"""Files that later commands may rewrite; the rest of an output never changes."""

_HINT = f"convert again; if you have trained it, remove {MANIFEST_NAME}: the folder is then taken as it is"

_LIBRARIES = ("moesaic", "torch", "transformers", "safetensors")


def hash_file(path: Path) -> str:
    """sha256 of a file, read in small blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_manifest(folder: Path, key: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of a finished folder.

    Args:
        folder: The output.
        key: What the output depends on: source and calibration fingerprints, method, options, seed.
        known: sha256 of files that were hashed before, by name; the others are hashed here.
    """
    files = {
        name: {"sha256": known.get(name) or hash_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in file_names(folder)
        if name not in UNHASHED
    }
    return {"format": FORMAT, "versions": _versions(), "key": dict(key), "files": files}


@functools.cache
def _versions() -> dict[str, str]:
    return {library: version(library) for library in _LIBRARIES}


def file_names(folder: Path) -> list[str]:
    """All files below ``folder``, as sorted relative names with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def load_manifest(folder: Path) -> dict[str, Any]:
    """Read ``manifest.json``. Raises VerificationError when it is missing, damaged or of another format."""
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise VerificationError(f"{path}: format {manifest['format']}, this version reads {FORMAT}")
        if not all(isinstance(entry["sha256"], str) for entry in manifest["files"].values()):
            raise TypeError("sha256 is not text")
    except FileNotFoundError as error:
        raise VerificationError(f"{folder} has no {MANIFEST_NAME}", "is it an output of moesaic?") from error
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{path} is damaged: {' '.join(str(error).split())}", "convert again") from error
    return manifest


def check_manifest(folder: Path) -> int:
    """Compare every file with the manifest; returns how many there are.

    Raises:
        VerificationError: naming the first file that is missing, changed, not listed, or outside the folder.
    """
    files: dict[str, dict[str, Any]] = load_manifest(folder)["files"]
    for name, entry in files.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise VerificationError(f"{MANIFEST_NAME} names {name!r}, outside the folder", "do not use this folder")
        _check_file(folder / name, entry)
    # A stray weight file or module would be loaded without being checked; other additions are the user's business.
    for name in file_names(folder):
        if name not in files and name.endswith((".safetensors", ".py", ".bin", ".index.json")):
            raise VerificationError(f"{folder / name} is not in {MANIFEST_NAME}", "remove it or convert again")
    return len(files)


def check_files(folder: Path, names: Iterable[str], *, hashed: bool = True) -> None:
    """Compare some files with the manifest: their content, or only their sizes.

    Raises:
        VerificationError: naming the first that is missing, changed or not listed.
    """
    files: dict[str, dict[str, Any]] = load_manifest(folder)["files"]
    for name in names:
        if name not in files:
            raise VerificationError(f"{folder / name} is not in {MANIFEST_NAME}", _HINT)
        _check_file(folder / name, files[name], hashed=hashed)


def _check_file(file: Path, entry: Mapping[str, Any], *, hashed: bool = True) -> None:
    try:
        there = file.is_file()
    except OSError:  # a name that is too long for any file
        there = False
    if not there:
        raise VerificationError(f"{file} is missing", "convert again")
    if file.stat().st_size != entry.get("bytes") or (hashed and hash_file(file) != entry["sha256"]):
        raise VerificationError(f"{file} is not the file that was written (sha256 differs)", _HINT)
