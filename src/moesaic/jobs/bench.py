"""How fast is a converted model, and how large? Beside its dense model, in transformers and in llama.cpp, in one run.

Axes: R rounds and one to warm up, B sequences, W tokens of a prompt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.loading import load_model, prefill_as_loaded
from moesaic.errors import InputError
from moesaic.evaluate.llama_cpp_speed import measure_files
from moesaic.evaluate.speed import Contender, Turns, take_turns, times_as_fast
from moesaic.progress import Progress, Silent

DENSE, CONVERTED = "dense", "converted"


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        prompt: Tokens of a prompt.
        steps: Tokens that are decoded after it.
        rounds: Rounds that count; one more warms up.
        batches: Numbers of sequences that are read and decoded together.
        threads: CPU threads.
        dtype: Of the weights in transformers, as in torch; ``auto`` as they are stored.
    """

    prompt: int = 128
    steps: int = 16
    rounds: int = 3
    batches: tuple[int, ...] = (1, 8)
    threads: int = 1
    dtype: str = "auto"


def bench(
    folder: Path,
    baseline: Path,
    *,
    settings: BenchSettings,
    ggufs: tuple[Path, Path] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a converted model beside the dense one.

    Args:
        folder: The converted model.
        baseline: The dense one.
        settings: What is measured.
        ggufs: Files of the dense and of the converted model, in this order; llama.cpp is left out without them.
        progress: Receives rounds done, and how long it will take.

    Returns:
        ``{"settings", "engines": {engine: [row, ...]}}``, ready for JSON. A row has the ``model``, its ``batch``,
        ``megabytes`` of its weights, and ``prefill`` and ``decode`` in tokens per second: ``best`` and ``median``, and
        ``times_dense`` of both.

    Raises:
        InputError: an empty setting, a folder that does not load, or xllamacpp is missing.
    """
    progress = progress or Silent()
    if min(settings.prompt, settings.steps, settings.rounds, settings.threads, *settings.batches) < 1:
        raise InputError("prompt, steps, rounds, threads and batches are at least 1", "see `moesaic bench --help`")
    engines = {"transformers": _in_transformers(folder, baseline, settings, progress)}
    if ggufs is not None:
        engines["llama.cpp"] = _in_llama_cpp(*ggufs, settings, progress)
    return {"settings": vars(settings) | {"batches": list(settings.batches)}, "engines": engines}


def _in_transformers(folder: Path, baseline: Path, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    torch.set_num_threads(settings.threads)
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    models = {DENSE: load_model(baseline, dtype), CONVERTED: load_model(folder, dtype)}
    vocabulary = min(int(model.config.get_text_config().vocab_size) for model in models.values())
    rows = []
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(prefill_as_loaded(model))
        for batch in settings.batches:
            shape = (settings.rounds + 1, batch, settings.prompt)
            prompts_RBW = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
            contenders = {name: Contender(model) for name, model in models.items()}
            advance = _Announced(progress, f"transformers, {batch} at a time", settings.rounds + 1)
            found = take_turns(contenders, prompts_RBW, settings.steps, advance=advance)
            sizes = {name: _megabytes(model) for name, model in models.items()}
            rows += _rows(found, sizes, batch, settings.prompt)
    return rows


class _Announced:
    """Tells of rounds, and after the first how long the others take."""

    def __init__(self, progress: Progress, label: str, rounds: int) -> None:
        self._progress, self._label, self._left = progress, label, rounds
        self._began = time.perf_counter()
        self._first = True
        progress.start(label, rounds)

    def __call__(self) -> None:
        self._left -= 1
        if self._first:
            seconds = self._left * (time.perf_counter() - self._began)
            self._progress.note(f"{self._label}: about {seconds:.0f} s")
            self._first = False
        self._progress.advance()


def _megabytes(model: Any) -> float:
    """Of parameters and buffers, each counted once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return round(sum(tensors.values()) / 1e6, 1)


def _rows(found: Mapping[str, Turns], sizes: Mapping[str, float], batch: int, prompt: int) -> list[dict[str, Any]]:
    return [
        {
            "model": name,
            "batch": batch,
            "megabytes": sizes[name],
            "prefill": _figures(found[DENSE].prefill, turns.prefill, batch * prompt),
            "decode": _figures(found[DENSE].decode, turns.decode, batch),
        }
        for name, turns in found.items()
    ]


def _figures(dense: Sequence[float], own: Sequence[float], tokens: int) -> dict[str, Any]:
    """Of seconds in the same turns, for so many tokens each."""
    return {
        "best": round(tokens / min(own), 2),
        "median": round(tokens / statistics.median(own), 2),
        "times_dense": [round(ratio, 3) for ratio in times_as_fast(dense, own)],
    }


def _in_llama_cpp(dense: Path, converted: Path, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """One sequence at a time."""
    advance = _Announced(progress, "llama.cpp, 1 at a time", settings.rounds + 1)
    counts = {"threads": settings.threads, "prompt": settings.prompt, "steps": settings.steps + 1}
    speeds = measure_files([dense, converted], rounds=settings.rounds, advance=advance, **counts)
    files = {DENSE: dense, CONVERTED: converted}
    found = {
        name: Turns([1 / one.prefill for one in speeds[file]], [1 / one.decode for one in speeds[file]])
        for name, file in files.items()
    }
    sizes = {name: round(file.stat().st_size / 1e6, 1) for name, file in files.items()}
    return _rows(found, sizes, 1, 1)
