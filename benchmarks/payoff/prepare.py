"""Folders and files: what is converted, and how it is stored. What is there is not made again."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.payoff.log import Log
from benchmarks.payoff.points import CONVERSIONS, DENSE, LLAMA_CPP, Point

from moesaic.anatomy import read_anatomy
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import MoesaicError
from moesaic.jobs.export_gguf import export_gguf


class Place:
    """A model's folder of work: conversions, GGUF files and the log. ``dense`` is the model itself."""

    def __init__(self, work: Path, dense: Path) -> None:
        self.work, self.dense = work, dense
        self.log = Log(work / "log.jsonl")

    def folder(self, model: str) -> Path:
        """Of the dense model or of a conversion."""
        return self.dense if model == DENSE else self.work / model

    def file(self, point: Point) -> Path:
        """What the point's engine loads."""
        if point.engine == LLAMA_CPP:
            return self.work / f"{point.key}.gguf"
        return self.folder(point.model)


def prepare(place: Place, points: Sequence[Point], tokens: int | None, say: Callable[[str], None]) -> None:
    """Convert and export what is missing. A point that fails is told of and left out; the others go on.

    Args:
        place: Of the model.
        points: What is wanted.
        tokens: Of calibration, in place of those of the presets.
        say: Takes lines for people.
    """
    place.work.mkdir(parents=True, exist_ok=True)
    for model in dict.fromkeys(point.model for point in points):
        files = [place.file(point) for point in points if point.model == model]
        if place.folder(model).exists() or all(file.exists() for file in files):
            continue
        _convert(place, model, tokens, say)
    for point in points:
        if point.engine == LLAMA_CPP and place.folder(point.model).exists() and not place.file(point).exists():
            _export(place, point, say)


def _convert(place: Place, model: str, tokens: int | None, say: Callable[[str], None]) -> None:
    anatomy = read_anatomy(Checkpoint(place.dense).config)
    arguments = CONVERSIONS[model].arguments(anatomy.num_layers, anatomy.d_ff)
    if tokens is not None and CONVERSIONS[model].form != "neurons":
        arguments += ["--calib-tokens", str(tokens)]
    command = ["convert", str(place.dense), str(place.folder(model)), *arguments, "-q"]
    say(f"moesaic {' '.join(command)}")
    begin = time.monotonic()
    if subprocess.run([sys.executable, "-m", "moesaic", *command]).returncode == 0:
        seconds = round(time.monotonic() - begin, 1)
        place.log.add({"stage": "convert", "model": model, "arguments": arguments, "seconds": seconds})


def _export(place: Place, point: Point, say: Callable[[str], None]) -> None:
    try:
        written = export_gguf(place.folder(point.model), place.file(point), point.dtype, check=False)
    except MoesaicError as error:
        say(f"{point.key}: {error.message}")
        return
    about: dict[str, Any] = {"stage": "export", "point": point.key, "fell_back": len(written.fallbacks)}
    place.log.add(about)
    say(f"{point.key}: {written.nbytes / 1e6:.0f} MB, {len(written.fallbacks)} tensors fell back")
