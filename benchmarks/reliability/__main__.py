"""What moesaic does when it is killed, when disks are full, folders vanish, and inputs are damaged.

    python -m benchmarks.reliability --quick
    python -m benchmarks.reliability --report docs/results/reliability
    python -m benchmarks.reliability --fuzz 10 --fuzz-python VENV/bin/python --report docs/results/reliability

All on tiny models in bf16. Results are appended to WORK/log.jsonl, seeded, and a second run goes on where the first
stopped; remove WORK to begin anew. Exit code 1 when anything was found.

Times are CPU seconds in a process that has Python, torch and transformers loaded already: moesaic's own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from benchmarks.reliability.cases import VERBS, Inputs, command, make_inputs, prepare
from benchmarks.reliability.child import Sandbox, warm_up
from benchmarks.reliability.faults import faults
from benchmarks.reliability.fuzz import TARGETS, fuzz
from benchmarks.reliability.kills import kills
from benchmarks.reliability.malformed import malformed
from benchmarks.reliability.page import table, write_page

from moesaic.cli.console import quiet_libraries

PARTS = ("kill", "faults", "malformed")


def main() -> None:
    """Run what the log does not have, print what was found, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of everything, about seven minutes")
    parser.add_argument("--kills", type=int, help="default: 200, quick: 12")
    parser.add_argument("--malformed", type=int, help="damaged inputs; default: 100, quick: 24")
    parser.add_argument("--share", type=float, help="of the file operations that fail; default: 1, quick: 0.02")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--fuzz", type=float, metavar="MINUTES", help=f"also atheris on {', '.join(TARGETS)}, each")
    parser.add_argument("--fuzz-python", type=Path, help="a Python with atheris and what moesaic needs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for log and models, on the disk to be tested")
    parser.add_argument("--report", type=Path, help="write REPORT.md and REPORT.json")
    args = parser.parse_args()
    if args.fuzz and args.fuzz_python is None:
        parser.error("--fuzz needs --fuzz-python")
    work = (args.work or Path(tempfile.gettempdir()) / f"moesaic-reliability{'-quick' * args.quick}").absolute()
    work.mkdir(parents=True, exist_ok=True)
    log = work / "log.jsonl"
    rows = read_log(log)
    with log.open("a", encoding="utf-8") as stream:
        for row in campaign(args, work, {row["key"] for row in rows}):
            stream.write(f"{json.dumps(row)}\n")
            stream.flush()
            rows.append(row)
            if row["faults"]:
                print(f"{row['key']}: {'; '.join(row['faults'])}", file=sys.stderr, flush=True)
    print(table(rows))
    if args.report is not None:
        write_page(args.report, rows)
    sys.exit(any(row["faults"] for row in rows))


def campaign(args: argparse.Namespace, work: Path, known: set[str]) -> Iterator[dict[str, Any]]:
    """All rounds that are not ``known`` yet."""
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them
    quiet_libraries()
    os.environ["MOESAIC_CACHE"] = str(work / "cache")
    inputs = make_inputs(work / "inputs")
    box = Sandbox(work / "sandbox")
    _load_modules(inputs, box)
    if "kill" in args.parts:
        yield from kills(args.kills or (12 if args.quick else 200), args.seed, inputs, box, known)
    if "faults" in args.parts:
        yield from faults(args.share or (0.02 if args.quick else 1.0), args.seed, inputs, box, known)
    if "malformed" in args.parts:
        yield from malformed(args.malformed or (24 if args.quick else 100), args.seed, inputs, box, known)
    if args.fuzz:
        yield from fuzz(args.fuzz, args.fuzz_python, args.seed, inputs, work, known)


def _load_modules(inputs: Inputs, box: Sandbox) -> None:
    """Run every verb once in this process."""
    box.clear()
    here = Path.cwd()
    for verb in VERBS:
        out = box.folder / verb
        prepare(verb, inputs, out)
        warm_up(command(verb, inputs, out))
    warm_up(["verify", str(inputs.converted)])
    warm_up(["undo", str(inputs.converted), str(box.folder / "back")])
    warm_up(["inspect", str(inputs.converted)])
    warm_up(["plan", str(inputs.dense), "--layout", "S2A2E7"])
    os.chdir(here)
    box.clear()


def read_log(log: Path) -> list[dict[str, Any]]:
    """The rounds of earlier runs; a torn last line is cut off."""
    if not log.exists():
        return []
    lines = log.read_text(encoding="utf-8").split("\n")
    log.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
    return [json.loads(line) for line in lines[:-1]]


if __name__ == "__main__":
    main()
