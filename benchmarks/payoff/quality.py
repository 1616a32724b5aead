"""Perplexity of every point in the engine that serves it, all on the same windows of WikiText-2's test split.

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.payoff.log import machine
from benchmarks.payoff.points import LLAMA_CPP, Point
from benchmarks.payoff.prepare import Place
from torch import Tensor

from moesaic.calibration.samples import evaluation_text
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.evaluate.llama_cpp_perplexity import llama_cpp_perplexity
from moesaic.evaluate.perplexity import Perplexity, perplexity, protocol_name, token_windows


def quality(place: Place, points: Sequence[Point], windows: int, window: int, say: Callable[[str], None]) -> None:
    """Measure what the log lacks, a line per point. Points whose files are missing are told of and left out.

    In transformers, weights have the type in which they are stored, and every token is computed as a generated one.
    """
    ids_NW, name = None, protocol_name("wikitext2-raw/test", window, windows)
    for number, point in enumerate(points, start=1):
        file = place.file(point)
        if quality_of(place.log.all(stage="quality", point=point.key), name) is not None:
            continue
        if not file.exists():
            say(f"{point.key}: {file.name} is missing; run the stage prepare")
            continue
        if ids_NW is None:
            ids_NW = token_windows(load_tokenizer(place.dense), evaluation_text(), window, windows)
        begin = time.monotonic()
        found = _measured(point, file, ids_NW, name)
        seconds, size = round(time.monotonic() - begin, 1), round(stored_megabytes(file), 1)
        line = {"stage": "quality", "point": point.key, "machine": machine(), "stored_megabytes": size}
        place.log.add(line | {"seconds": seconds, "perplexity": found.to_dict()})
        say(f"{number}/{len(points)}  {point.key}: perplexity {found.value:.3f}, {seconds} s")


def _measured(point: Point, file: Path, ids_NW: Tensor, name: str) -> Perplexity:
    if point.engine == LLAMA_CPP:
        return llama_cpp_perplexity(file, ids_NW, name)
    return perplexity(load_model(file, "auto"), ids_NW, name)


def quality_of(lines: Sequence[Mapping[str, Any]], name: str | None = None) -> Perplexity | None:
    """The last perplexity among lines of one point, under a protocol of this name."""
    for line in reversed(lines):
        found = line["perplexity"]
        if name is None or found["name"] == name:
            return Perplexity(found["name"], found["value"], found["predicted"], tuple(found["window_nll"]))
    return None


def stored_megabytes(file: Path) -> float:
    """Of a GGUF, or of the weights in a folder."""
    files = [file] if file.is_file() else list(file.glob("model*.safetensors"))
    return sum(one.stat().st_size for one in files) / 1e6
