"""Signals at random moments of convert, export, tune and eval; then the same command again."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.cases import VERBS, Inputs, command, content, differing, partial_of, prepare
from benchmarks.reliability.child import Kill, Outcome, Sandbox

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_ATTEMPTS = 8


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: what it wrote, and the CPU seconds it took."""

    content: dict[str, str]
    seconds: float


def reference(verb: str, inputs: Inputs, box: Sandbox) -> Reference:
    """Run undisturbed twice; SystemExit where that fails or differs, as then nothing can be said."""
    found = []
    for _ in range(2):
        box.clear()
        out = box.folder / "out"
        prepare(verb, inputs, out)
        outcome = box.run(command(verb, inputs, out))
        if outcome.code != 0 or outcome.left:
            raise SystemExit(f"{verb}, undisturbed, ended with {outcome.code}: {outcome.err} {outcome.left}")
        found.append(Reference(content(out), outcome.seconds))
    if names := differing(found[0].content, found[1].content):
        raise SystemExit(f"{verb}: two undisturbed runs differ in {', '.join(names)}")
    return found[1]


def kills(number: int, seed: int, inputs: Inputs, box: Sandbox, known: set[str]) -> Iterator[dict[str, Any]]:
    """``number`` kills, spread over verbs, signals and the time of a run; those whose key is ``known`` are left out."""
    each = -(-number // len(VERBS))
    for verb in VERBS:
        rounds = [(n, f"kill {verb} {n}") for n in range(min(each, number))]
        if all(key in known for _, key in rounds):
            continue
        whole = reference(verb, inputs, box)
        for n, key in rounds:
            if key not in known:
                dice = random.Random(f"{seed} {key}")
                moment = whole.seconds * (n + dice.random()) / len(rounds)
                yield {"key": key, **_round(verb, SIGNALS[n % len(SIGNALS)], moment, whole, inputs, box)}


def _round(
    verb: str, number: signal.Signals, moment: float, whole: Reference, inputs: Inputs, box: Sandbox
) -> dict[str, Any]:
    """One kill that hit a run, and the same command again."""
    out = box.folder / "out"
    outcome, attempts = None, 0
    while outcome is None or (outcome.code == 0 and attempts < _ATTEMPTS):
        moment *= 0.9 if attempts else 1  # it was over before
        attempts += 1
        box.clear()
        prepare(verb, inputs, out)
        outcome = box.run(command(verb, inputs, out), kill=Kill(number, moment))
    about = {"part": "kill", "verb": verb, "signal": number.name, "moment": round(moment, 2)}
    faults = after_stop(verb, outcome, whole, inputs, box)
    if outcome.code == 0:
        faults.append("no kill hit a run")
    if number == signal.SIGINT and outcome.code not in (0, 130):
        faults.append(f"Ctrl-C ended it with {outcome.code}")
    found = "complete" if _appeared(verb, out, whole) else "partial" if partial_of(out).exists() else "absent"
    again, more = resume(verb, whole, inputs, box)
    return about | {"found": found, "again": round(again, 2), "faults": [*faults, *more]}


def after_stop(verb: str, outcome: Outcome, whole: Reference, inputs: Inputs, box: Sandbox) -> list[str]:
    """What is wrong with what an interrupted run left: the output must be absent or complete."""
    out = box.folder / "out"
    faults = [f"left: {what}" for what in outcome.left]
    if crash := outcome.crash:
        faults.append(crash)
    if verb == "eval":
        before = content(inputs.converted)
        after = {name: value for name, value in content(out).items() if not name.endswith(".tmp")}
        if differing(after, before) and differing(after, whole.content):
            faults.append(f"eval left the folder neither old nor new: {', '.join(differing(after, before))}")
    elif out.exists() and (names := differing(content(out), whole.content)):
        faults.append(f"the output is there and wrong: {', '.join(names[:3])}")
    return faults + strangers(box, finished=False)


def resume(verb: str, whole: Reference, inputs: Inputs, box: Sandbox) -> tuple[float, list[str]]:
    """The same command once more, where there is something left to do: CPU seconds, and what is wrong."""
    out = box.folder / "out"
    faults: list[str] = []
    seconds = 0.0
    if not _appeared(verb, out, whole):
        outcome = box.run(command(verb, inputs, out))
        seconds = outcome.seconds
        faults += [f"left after the second run: {what}" for what in outcome.left]
        if outcome.code != 0:
            return seconds, [*faults, f"the second run ended with {outcome.code}: {last_line(outcome)}"]
        faults += strangers(box, finished=True)
    if names := differing(content(out), whole.content):
        faults.append(f"after the second run these differ: {', '.join(names[:3])}")
    return seconds, faults


def strangers(box: Sandbox, *, finished: bool) -> list[str]:
    """Entries beside the output that nobody would clear away."""
    allowed = {"out"} if finished else {"out", "out.partial"}
    return [f"left: {path.name}" for path in sorted(box.folder.iterdir()) if path.name not in allowed]


def last_line(outcome: Outcome) -> str:
    """What it said in the end."""
    lines = outcome.err.strip().splitlines()
    return " / ".join(lines[-2:])[:200]


def _appeared(verb: str, out: Path, whole: Reference) -> bool:
    """Whether the output is there; for eval, whether its results are."""
    return not differing(content(out), whole.content) if verb == "eval" else out.exists()
