"""Full and read-only disks, folders that vanish, and two processes on one output, at the file operations of a run."""

from __future__ import annotations

import errno
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.reliability.cases import VERBS, Inputs, command, partial_of, prepare
from benchmarks.reliability.child import Outcome, Sandbox
from benchmarks.reliability.kills import Reference, after_stop, last_line, reference, resume
from benchmarks.reliability.operations import Disturbance

SIZES = (1000, 5000, 20_000, 50_000)
"""Largest file that a run may write, in bytes, where the limit is the system's own."""
_FEW = 0.1
"""Below this share, the disturbances that take longest are tried at one moment of a run."""
_RESOURCES = 4


def faults(share: float, seed: int, inputs: Inputs, box: Sandbox, known: set[str]) -> Iterator[dict[str, Any]]:
    """Every verb under every disturbance. ``share``: of the file operations, at random; 1 is each of them."""
    for verb in VERBS:
        total = None
        whole = None
        for part in PARTS:
            done = f"{part} {verb} done at {share}"
            if done in known:
                continue
            whole = whole or reference(verb, inputs, box)
            total = total or _operations(verb, inputs, box)
            dice = random.Random(f"{seed} {verb} {part}")  # the same moments where other parts are done already
            moments = sorted(dice.sample(range(1, total + 1), max(2, round(share * total))))
            chosen = moments if part == "full disk" else _some(moments, share)
            for round_, play in PARTS[part](verb, chosen, whole, inputs, box):
                key = f"{part} {verb} {round_}"
                if key not in known:
                    yield {"key": key, "part": part, "verb": verb, "of": total, "faults": play()}
            yield {"key": done, "part": part, "verb": verb, "of": total, "faults": []}


Play = tuple[str, Callable[[], list[str]]]


def _full(verb: str, moments: list[int], whole: Reference, inputs: Inputs, box: Sandbox) -> Iterator[Play]:
    plan = Disturbance("refuse", box.folder, code=errno.ENOSPC)
    for number in moments:
        yield str(number), lambda n=number: _refused(verb, replace(plan, number=n), whole, inputs, box)
    for size in SIZES:
        yield f"limit {size}", lambda size=size: _refused(verb, _limit(size), whole, inputs, box)


def _read_only(verb: str, moments: list[int], whole: Reference, inputs: Inputs, box: Sandbox) -> Iterator[Play]:
    plan = Disturbance("refuse", box.folder, code=errno.EROFS)
    for number in moments:
        yield str(number), lambda n=number: _refused(verb, replace(plan, number=n), whole, inputs, box)


def _vanished(verb: str, moments: list[int], whole: Reference, inputs: Inputs, box: Sandbox) -> Iterator[Play]:
    for number in moments:
        for victim in ("source", "staging", "everything"):
            yield (
                f"{victim} {number}",
                lambda n=number, victim=victim: _without(verb, victim, n, whole, inputs, box),
            )


def _two(verb: str, moments: list[int], whole: Reference, inputs: Inputs, box: Sandbox) -> Iterator[Play]:
    for number in moments:
        yield str(number), lambda n=number: _beside(verb, n, whole, inputs, box)


PARTS: dict[str, Callable[..., Iterator[Play]]] = {
    "full disk": _full,
    "read-only": _read_only,
    "vanished": _vanished,
    "two processes": _two,
}


def _some(moments: list[int], share: float) -> list[int]:
    """About ten of them, or one."""
    return moments[:1] if share < _FEW else moments[:: max(1, len(moments) // 10)]


def _operations(verb: str, inputs: Inputs, box: Sandbox) -> int:
    """How many file operations a run has."""
    box.clear()
    out = box.folder / "out"
    prepare(verb, inputs, out)
    counter = box.folder.parent / "operations"
    box.run(command(verb, inputs, out), Disturbance("count", box.folder, counter=counter))
    return int(counter.read_text())


def _limit(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _refused(verb: str, disturb: Callable[[], None], whole: Reference, inputs: Inputs, box: Sandbox) -> list[str]:
    """A run whose writes fail from some moment on; then the same command with the disk in order."""
    box.clear()
    prepare(verb, inputs, box.folder / "out")
    outcome = box.run(command(verb, inputs, box.folder / "out"), disturb)
    faults = _plain(outcome) + after_stop(verb, outcome, whole, inputs, box)
    full = isinstance(disturb, Disturbance) and disturb.code == errno.ENOSPC
    if full and outcome.code not in (0, _RESOURCES):
        faults.append(f"a full disk ended it with {outcome.code}: {last_line(outcome)}")
    _, more = resume(verb, whole, inputs, box)
    return faults + more


def _without(verb: str, victim: str, number: int, whole: Reference, inputs: Inputs, box: Sandbox) -> list[str]:
    """A run that loses its source, its staging folder, or all of its working directory."""
    box.clear()
    source, kept = inputs.dense.parent, box.folder.parent / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(source, kept)
    out = box.folder / "out"
    prepare(verb, inputs, out)
    lost = {"source": source, "staging": out if verb == "eval" else partial_of(out), "everything": box.folder}
    outcome = box.run(command(verb, inputs, out), Disturbance("vanish", box.folder, number, victim=lost[victim]))
    shutil.copytree(kept, source, dirs_exist_ok=True)
    box.folder.mkdir(exist_ok=True)
    faults = _plain(outcome) + [f"left: {what}" for what in outcome.left]
    if victim == "source":
        faults += after_stop(verb, outcome, whole, inputs, box)
    elif verb == "eval":
        shutil.rmtree(out, ignore_errors=True)
        prepare(verb, inputs, out)
    _, more = resume(verb, whole, inputs, box)
    return faults + more


def _beside(verb: str, number: int, whole: Reference, inputs: Inputs, box: Sandbox) -> list[str]:
    """The same command beside a run that has stopped in the middle; the first then goes on."""
    box.clear()
    out = box.folder / "out"
    prepare(verb, inputs, out)
    first = box.start(command(verb, inputs, out), Disturbance("stop", box.folder, number), "first")
    if not first.stopped():
        first.wait()
        return ["the first run did not stop"]
    second = box.run(command(verb, inputs, out))
    first.go_on()
    outcomes = {"first": first.wait(), "second": second}
    faults = [f"{name}: {what}" for name, outcome in outcomes.items() for what in _plain(outcome)]
    refused = {name: outcome for name, outcome in outcomes.items() if outcome.code != 0}
    # A run that stopped before it had the lock finds the other's output; eval has none of its own.
    if len(refused) != (0 if verb == "eval" else 1):
        faults.append(f"{len(refused)} of the two were refused")
    for name, outcome in refused.items():
        if "another process is writing" not in outcome.err and "exists and is complete" not in outcome.err:
            faults.append(f"the {name} was refused otherwise: {last_line(outcome)}")
    _, more = resume(verb, whole, inputs, box)
    return faults + more


def _plain(outcome: Outcome) -> list[str]:
    """Whether an error was one line and a hint."""
    if outcome.crash:
        return [outcome.crash]
    if outcome.code not in (0, 130) and sum(line.startswith("error: ") for line in outcome.err.splitlines()) != 1:
        return [f"no plain error: {last_line(outcome)}"]
    return []
