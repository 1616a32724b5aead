"""atheris on the parsers of what moesaic reads: headers, indexes, configs, blueprints and manifests.

Run as a program by a Python that has atheris, it fuzzes one target: ``python -m benchmarks.reliability.fuzz TARGET
SEEDS SECONDS``. atheris is no dependency: any environment with it and what moesaic needs will do.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TARGETS = ("header", "index", "config", "blueprint", "manifest")


def fuzz(minutes: float, python: Path, seed: int, inputs: Any, work: Path, known: set[str]) -> Iterator[dict[str, Any]]:
    """Each target for so many minutes, in a process of its own."""
    for target in TARGETS:
        key = f"fuzz {target} {minutes:g}"
        if key in known:
            continue
        folder = work / "fuzz" / target
        shutil.rmtree(folder, ignore_errors=True)
        _seeds(target, inputs, folder / "corpus")
        command = [str(python), "-m", "benchmarks.reliability.fuzz", target, str(folder), str(round(60 * minutes))]
        done = subprocess.run([*command, str(seed)], capture_output=True, text=True, errors="replace", check=False)
        runs = re.findall(r"^#(\d+)", done.stderr, re.MULTILINE)
        row = {"key": key, "part": "fuzz", "target": target, "minutes": minutes, "runs": int(runs[-1]) if runs else 0}
        yield row | {"faults": [_crash(done.stderr)] if done.returncode else []}


def _crash(text: str) -> str:
    marks = ("=== Uncaught Python exception", "Error", "ERROR")
    lines = [line.strip() for line in text.splitlines()]
    found = next((i for mark in marks for i, line in enumerate(lines) if mark in line), max(0, len(lines) - 3))
    return " ".join(lines[found : found + 3])[:400]


def _seeds(target: str, inputs: Any, corpus: Path) -> None:
    """Valid inputs to begin with."""
    corpus.mkdir(parents=True)
    index = inputs.converted / "model.safetensors.index.json"
    files = {
        "header": [inputs.dense / "model.safetensors"],
        "index": [index],
        "config": [inputs.dense / "config.json", inputs.converted / "config.json"],
        "blueprint": [inputs.converted / "blueprint.json"],
        "manifest": [inputs.converted / "manifest.json"],
    }
    for number, file in enumerate(files[target]):
        content = file.read_bytes()
        if target == "header":
            content = content[: 8 + int.from_bytes(content[:8], "little")]
        (corpus / str(number)).write_bytes(content)


def main(target: str, folder: Path, seconds: int, seed: int) -> None:
    """Fuzz one target; a wrong exception ends the process with its trace."""
    atheris: Any = importlib.import_module("atheris")

    with atheris.instrument_imports(include=["moesaic"]):
        from moesaic.errors import MoesaicError

        reader = _readers(folder)[target]

    def once(data: bytes) -> None:
        message = None
        try:
            reader(data)
        except MoesaicError as error:
            message = error.message
        assert message is None or message.strip(), "an error without a message"

    limits = [f"-max_total_time={seconds}", "-max_len=20000", "-rss_limit_mb=8000", "-timeout=20"]
    places = [f"-artifact_prefix={folder}/", str(folder / "corpus")]
    atheris.Setup([sys.argv[0], *limits, f"-seed={seed + 1}", *places], once)
    atheris.Fuzz()


def _readers(folder: Path) -> dict[str, Callable[[bytes], object]]:
    """target -> what reads one input: a folder that is whole but for the file that is fuzzed."""
    from moesaic.anatomy import read_anatomy
    from moesaic.blueprint.model import Blueprint
    from moesaic.checkpoint.converted import read_blueprint
    from moesaic.checkpoint.reader import Checkpoint
    from moesaic.staging.manifest import check_manifest

    source = folder.parents[1] / "inputs"
    place = {name: folder / name for name in ("dense", "converted")}
    for name, path in place.items():
        if not path.exists():
            shutil.copytree(source / name, path)
    tail = (place["dense"] / "model.safetensors").read_bytes()
    tail = tail[8 + int.from_bytes(tail[:8], "little") :]

    def header(data: bytes) -> None:
        (place["dense"] / "model.safetensors").write_bytes(data + tail)
        checkpoint = Checkpoint(place["dense"])
        for name in checkpoint.names:
            checkpoint.finite_tensor(name)

    def index(data: bytes) -> None:
        (place["converted"] / "model.safetensors.index.json").write_bytes(data)
        Checkpoint(place["converted"])

    def config(data: bytes) -> None:
        for path in place.values():
            (path / "config.json").write_bytes(data)
        (place["converted"] / "manifest.json").unlink(missing_ok=True)
        read_anatomy(Checkpoint(place["dense"]).config)
        read_blueprint(Checkpoint(place["converted"]))

    def blueprint(data: bytes) -> None:
        (place["converted"] / "blueprint.json").write_bytes(data)
        Blueprint.load(place["converted"]).digest()

    def manifest(data: bytes) -> None:
        (place["converted"] / "manifest.json").write_bytes(data)
        check_manifest(place["converted"])

    return {"header": header, "index": index, "config": config, "blueprint": blueprint, "manifest": manifest}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
