"""Do conversions still write the same bytes? Hashes of what every method, family and target makes of small models.

    python -m benchmarks.fingerprints save FILE [--real MODEL]      before a change of the code
    python -m benchmarks.fingerprints compare FILE [--real MODEL]   after it: names every file that differs

A refusal counts as a result too, by its text. Left out are results.json, the card and the manifest, which hold timings
and versions. Finished cases are kept in FILE, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.rows import write_rows
from tests.dtypes import CALIBRATION, METHODS
from tests.targets.test_matrix import CASES as BACKBONES
from tests.tiny_models import FAMILIES, MOE_FAMILIES, MOE_VARIANTS, VARIANTS, build_tiny

import moesaic

TIMED = {"results.json", "README.md", "report.html", "manifest.json"}
DEAR = ("tomoe", "secret_moe", "llama_moe", "moefication", "random")
"""Methods that are tried on two families only: they see nothing of a family that the others do not."""
REAL: dict[str, dict[str, Any]] = {
    "cmoe": {"method": "cmoe", "options": {"layout": "S3A3E8"}},
    "mlpmoe": {"method": "mlpmoe", "options": {"keep": 28}},
    "token clusters": {"method": "token_clusters", "options": {"split": "union", "active": 0.5, "experts": 32}},
    "static": {"method": "static", "options": {"active": 0.5}},
}
Case = tuple[str, str, dict[str, Any]]


def cases() -> Iterator[Case]:
    """Name, tiny model (of the families, or of the targets' matrix), settings of the conversion."""
    for family in [*FAMILIES, *VARIANTS, *MOE_FAMILIES, *MOE_VARIANTS]:
        hierarchical = family in {*MOE_FAMILIES, *MOE_VARIANTS}
        for name, (method, options) in METHODS.items():
            if method in DEAR and family not in ("llama", "gpt2"):
                continue
            settings = {"method": method, "options": options, "target": "moesaic", "hierarchical": hierarchical}
            yield f"{family} {name}", family, settings
    for backbone, (_, _, targets) in BACKBONES.items():
        for target in targets:
            settings = {"method": "cmoe", "options": {"layout": "S2A2E6"}, "router": "oracle", "target": target}
            yield f"{backbone} as {target}", backbone, settings


def hashes(folder: Path) -> dict[str, str]:
    """sha256 by file name, of what no timing enters."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in TIMED)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fingerprint(source: Path, settings: dict[str, Any], calibration: dict[str, int]) -> dict[str, str]:
    """The hashes of one conversion, or the text of its refusal."""
    with tempfile.TemporaryDirectory() as work:
        try:
            return hashes(moesaic.convert(source, Path(work) / "out", calibration=calibration, **settings).output)
        except moesaic.MoesaicError as error:
            return {"refused": str(error).replace(work, "")}


def measure(file: Path, real: Path | None) -> dict[str, dict[str, str]]:
    """All cases that ``file`` lacks, kept there as they come."""
    found: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.exists() else {}

    def keep(name: str, made: dict[str, str]) -> None:
        found[name] = made
        write_rows(file, found)
        print(name, made.get("refused", f"{len(made)} files"), flush=True)

    with tempfile.TemporaryDirectory() as work:
        for name, model, settings in cases():
            if name in found:
                continue
            family, config = (model, {}) if model not in BACKBONES else BACKBONES[model][:2]
            folder = Path(work) / model
            if not folder.exists():
                build_tiny(family, folder, **config)
            keep(name, fingerprint(folder, settings, CALIBRATION))
        if real is not None:
            for name, settings in REAL.items():
                if f"real {name}" not in found:
                    keep(f"real {name}", fingerprint(real, settings, {"tokens": 2048, "window": 512}))
    return found


def compare(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """One line per file that is not the same."""
    return [
        f"{name}: {file}"
        for name in sorted(before.keys() | after.keys())
        for file in sorted(before.get(name, {}).keys() | after.get(name, {}).keys())
        if before.get(name, {}).get(file) != after.get(name, {}).get(file)
    ]


def main() -> None:
    """Read the arguments, hash, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["save", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--real", type=Path, help="a real model, converted by four methods")
    given = parser.parse_args()
    if given.do == "save":
        measure(given.file, given.real)
        return
    now = given.file.with_suffix(".now.json")
    differences = compare(json.loads(given.file.read_text()), measure(now, given.real))
    print("\n".join(differences) or "all the same")
    shutil.move(now, given.file.with_suffix(".last.json"))
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
