"""``moesaic convert`` of a real model, killed with SIGKILL at random moments and run again: is it the same?

    python benchmarks/kill_resume.py MODEL [--kills 20] [--report docs/results/kill_resume.md] [-- CONVERT OPTIONS]

The real command line runs in a process of its own each time. An undisturbed run gives the reference, a second one the
time scale; then, per round, a run is killed at a random moment and the same command is run again. A run that has ended
before its kill does not count: it is repeated with an earlier one. After every kill the output must be absent or equal
to the reference in all files but results.json, which holds timings, and the card, which is made from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import moesaic
from moesaic.checkpoint.manifest import UNHASHED, file_names, hash_file

_ATTEMPTS = 10


@dataclass(frozen=True)
class Round:
    """One kill: when, what was there, and how long the same command took afterwards.

    ``found``: None where the run was killed between letting the output appear and ending.
    """

    moment: float
    found: Found | None
    resumed_seconds: float
    differing: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What a killed run left: layers whose decisions are kept, and shards of weights."""

    decided: int
    written: int


def fixed_hashes(folder: Path) -> dict[str, str]:
    """sha256 of all files that must not differ between runs."""
    names = UNHASHED - {"manifest.json"}
    return {name: hash_file(folder / name) for name in file_names(folder) if name not in names}


def convert(arguments: list[str], kill_after: float | None = None) -> tuple[int, float]:
    """Exit code (-9 when killed) and seconds of one run of the command line."""
    started = time.monotonic()
    command = [sys.executable, "-m", "moesaic", "convert", *arguments, "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        code = process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    return code, time.monotonic() - started


def left_by(partial: Path) -> Found:
    """What stands in a staging folder's log; a torn last line does not count."""
    log = partial / "progress.jsonl"
    decided, written = set(), set()
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["plans"] is not None:
            decided.add(entry["step"])
        if entry["sha256"] is not None:
            written.add(entry["step"])
    return Found(len(decided), len(written))


def killed(arguments: list[str], out: Path, reference: dict[str, str], moment: float) -> float:
    """Run until a kill hits; returns when it did. Raises SystemExit when a run that ended left anything wrong."""
    for _ in range(_ATTEMPTS):
        code, seconds = convert(arguments, moment)
        if code == -signal.SIGKILL:
            return moment
        if code != 0 or fixed_hashes(out) != reference:
            raise SystemExit(f"a run ended by itself after {seconds:.1f} s with {code}, or its output is wrong")
        shutil.rmtree(out)
        moment = 0.9 * min(moment, seconds)
    raise SystemExit(f"{_ATTEMPTS} runs in a row ended before they were to be killed: is the machine busy?")


def play(arguments: list[str], out: Path, reference: dict[str, str], moment: float) -> Round:
    """Kill one run at ``moment``, resume it, compare, and clean up. Raises SystemExit when anything is wrong."""
    moment = killed(arguments, out, reference, moment)
    partial = out.with_name(f"{out.name}.partial")
    if out.exists() and fixed_hashes(out) != reference:
        raise SystemExit(f"killed after {moment:.1f} s: the output is there and wrong")
    found = None if out.exists() else left_by(partial)
    seconds = 0.0
    if found is not None:
        resumed, seconds = convert(arguments)
        if resumed != 0:
            raise SystemExit(f"killed after {moment:.1f} s: the second run ended with {resumed}")
    hashes = fixed_hashes(out)
    differing = tuple(sorted(name for name, _ in hashes.items() ^ reference.items()))
    shutil.rmtree(out)
    shutil.rmtree(partial, ignore_errors=True)
    return Round(moment, found, seconds, differing)


def report(arguments: list[str], whole: float, rounds: list[Round]) -> str:
    """The results as markdown."""
    equal = sum(not played.differing for played in rounds)
    machine = f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores"
    lines = [
        "# Killed and resumed",
        "",
        f"`moesaic convert {' '.join(arguments)}`, undisturbed: {whole:.1f} s.",
        f"{len(rounds)} runs were killed with SIGKILL at random moments and run again:",
        f"**{equal} of {len(rounds)} outputs are byte-identical** to the undisturbed one (all files but results.json "
        "and the card made from it).",
        "The output folder was never there and wrong.",
        "",
        f"moesaic {moesaic.__version__}, {machine}.",
        "",
        "| killed after (s) | layers decided | shards written | second run (s) | differing files |",
        "|---|---|---|---|---|",
    ]
    for played in sorted(rounds, key=lambda played: played.moment):
        verdict = ", ".join(sorted(set(played.differing))) or "none"
        found = "all | all" if played.found is None else f"{played.found.decided} | {played.found.written}"
        lines.append(f"| {played.moment:.1f} | {found} | {played.resumed_seconds:.1f} | {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the options, play the rounds, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="markdown file to write; stdout if left out")
    parser.add_argument("--scratch", type=Path, help="folder for the outputs, on the disk to be tested")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        reference_folder, out = Path(scratch) / "reference", Path(scratch) / "out"
        for folder in (reference_folder, out):  # the second run is the one to time: by then the model is in memory
            code, whole = convert([str(args.model), str(folder), *options])
            if code != 0:
                raise SystemExit(f"the undisturbed run ended with {code}")
        reference = fixed_hashes(reference_folder)
        if fixed_hashes(out) != reference:
            raise SystemExit("two undisturbed runs differ")
        shutil.rmtree(out)
        rounds: list[Round] = []
        for number in range(args.kills):
            moment = whole * (number + dice.random()) / args.kills  # spread over the whole run
            rounds.append(play([str(args.model), str(out), *options], out, reference, moment))
            print(f"{number + 1}/{args.kills}: {rounds[-1]}", file=sys.stderr, flush=True)
    text = report([args.model.name, "OUT", *options], whole, rounds)
    if args.report is None:
        print(text)
    else:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(text, encoding="utf-8")
    sys.exit(any(played.differing for played in rounds))


if __name__ == "__main__":
    main()
