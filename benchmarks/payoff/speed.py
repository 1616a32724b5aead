"""Speed and memory of the points of one engine beside each other, each in a process of its own, in turn.

A round is one prompt and some steps, for one sequence and for several, of every point, in an order that is shuffled
anew. So a busy moment hits all alike, and ratios are taken within a round. The dense model of the engine is in every
run, and every line holds its rounds too.

Axes: B sequences, W tokens of a prompt.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.payoff.log import machine
from benchmarks.payoff.points import BASE, POINTS, Point
from benchmarks.payoff.prepare import Place

from moesaic.calibration.samples import evaluation_text
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.evaluate.fresh_process import Child

_CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Shape:
    """Of a request: sequences at a time, tokens of each prompt, steps after it."""

    batch: int
    prompt: int
    steps: int


SHAPES = (Shape(1, 256, 16), Shape(8, 16, 6))
_WARM = Shape(1, 16, 2)


def speed(
    place: Place,
    points: Sequence[Point],
    threads: int,
    seconds: float,
    say: Callable[[str], None],
    shapes: Sequence[Shape] = SHAPES,
    rounds: int = 5,
) -> None:
    """Measure the points of one engine that the log lacks with so many threads, in about so many seconds.

    At least two rounds, at most ``rounds``; another begins where the time is likely to suffice. Loading counts.
    """
    (engine,) = {point.engine for point in points}
    base = POINTS[BASE[engine]]
    missing = [p for p in points if place.log.find(stage="speed", point=p.key, threads=threads) is None]
    ready = [point for point in missing if place.file(point).exists()]
    for point in missing:
        if point not in ready:
            say(f"{point.key}: {place.file(point).name} is missing; run the stage prepare")
    if not ready:
        return
    began = time.monotonic()
    turns = list(dict.fromkeys([base, *ready]))
    prompts = _Prompts(place.dense)
    found: dict[str, list[dict[int, Any]]] = {point.key: [] for point in turns}
    with ExitStack() as stack:
        children = {point.key: stack.enter_context(_child(place, point, threads, shapes)) for point in turns}
        for child in children.values():
            child.answer()
        for child in children.values():
            ask(child, prompts.next(_WARM), _WARM)
        shuffled, taken = random.Random(0), []
        while len(taken) < rounds:
            begin = time.monotonic()
            ids = {shape: prompts.next(shape) for shape in shapes}
            for key in shuffled.sample(list(children), len(children)):
                found[key].append({shape.batch: ask(children[key], ids[shape], shape) for shape in shapes})
            taken.append(time.monotonic() - begin)
            say(f"{engine}, {threads} threads: round {len(taken)} of {len(turns)} points, {taken[-1]:.0f} s")
            if len(taken) >= 2 and time.monotonic() - began + taken[-1] > seconds:
                break
    for point in ready:
        place.log.add(_line(point, threads, shapes, found[point.key], found[base.key]))


def _child(place: Place, point: Point, threads: int, shapes: Sequence[Shape]) -> Child:
    settings = {
        "engine": point.engine,
        "model": str(place.file(point)),
        "threads": threads,
        "sequences": max(shape.batch for shape in shapes),
        "context": max(shape.prompt + shape.steps for shape in shapes) + 8,
    }
    # -P: the folder of the script is no place to import from.
    command = [sys.executable, "-P", str(_CHILD), json.dumps(settings)]
    environment = {"GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": str(threads)}
    return Child(command, engine=point.engine, subject=point.key, environment=environment)


def ask(child: Child, ids: list[list[int]], shape: Shape) -> dict[str, Any]:
    """Tokens per second of prompt and steps, and megabytes."""
    child.send(json.dumps({"ids": ids, "steps": shape.steps}))
    found = json.loads(child.answer())
    return {
        "prefill": round(shape.batch * shape.prompt / found["prefill"], 3),
        "decode": round(shape.batch / statistics.median(found["decode"]), 3),
        "megabytes": found["megabytes"],
    }


class _Prompts:
    """Text of WikiText-2, each token once."""

    def __init__(self, folder: Path) -> None:
        text = evaluation_text()[:100_000]
        self._ids: list[int] = load_tokenizer(folder)(text, add_special_tokens=False, verbose=False)["input_ids"]
        self._at = 0

    def next(self, shape: Shape) -> list[list[int]]:
        """Prompts [B, W]; the text begins anew where it ends."""
        size = shape.batch * shape.prompt
        if self._at + size > len(self._ids):
            self._at = 0
        ids = self._ids[self._at : self._at + size]
        self._at += size
        return [ids[row * shape.prompt : (row + 1) * shape.prompt] for row in range(shape.batch)]


def _line(
    point: Point, threads: int, shapes: Sequence[Shape], own: Sequence[dict[int, Any]], base: Sequence[dict[int, Any]]
) -> dict[str, Any]:
    """One point: its rounds and those of the dense model, by batch; what it held after the first single sequence."""
    regimes = {
        str(shape.batch): {
            kind: {"own": [turn[shape.batch][kind] for turn in own], "base": [turn[shape.batch][kind] for turn in base]}
            for kind in ("prefill", "decode")
        }
        for shape in shapes
    }
    held = round(own[0][shapes[0].batch]["megabytes"], 1)
    about = {"stage": "speed", "point": point.key, "threads": threads, "machine": machine(), "megabytes": held}
    return about | {"shapes": [vars(shape) for shape in shapes], "batches": regimes}
