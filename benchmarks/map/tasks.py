"""Task accuracy of rows of the map: every token masked, so that answers are those of decoding.

    python -m benchmarks.map.tasks MODEL WORK [--rows dense low4@50] [--limit 300]

WORK/tasks.jsonl gets a line for every row as soon as its questions are answered. The page of the map shows them.
Needs lm-eval and its data: see `benchmarks/compare/tasks.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.compare.table import accuracy_difference, mean_accuracy
from benchmarks.compare.tasks import DATA_SETS, data_folder, task_accuracy
from benchmarks.map.measure import Bench
from benchmarks.map.rows import BY_KEY
from benchmarks.rows import read_lines

from moesaic.calibration.config import CalibrationConfig
from moesaic.cli.console import fail, quiet_libraries, say
from moesaic.durable import append_line
from moesaic.errors import MoesaicError
from moesaic.options import build

FILE = "tasks.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    """Answer what is missing; what cannot work ends it with one line before any work."""
    try:
        _main(_parser().parse_args(argv))
    except MoesaicError as error:
        fail(error.message, error.hint, error.exit_code)


def _main(arguments: argparse.Namespace) -> None:
    data_folder()
    file = arguments.work / FILE
    done = {(record["row"], record["limit"]) for record in read_lines(file)}
    wanted = [key for key in arguments.rows if (key, arguments.limit) not in done]
    if not wanted:
        return
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    arguments.work.mkdir(parents=True, exist_ok=True)
    calibration = {"sources": ["wikitext=2", "wiki=1"], "tokens": 8192, "window": 512, "compute_dtype": arguments.dtype}
    bench = Bench(arguments.model, build(CalibrationConfig, calibration, "calibration"))
    for key in wanted:
        record = answered(bench, key, arguments.limit, arguments.work)
        append_line(file, json.dumps(record))
        say(f"{key}: {mean_accuracy(record):.1%} of the questions, {record['seconds']} s")


def answered(bench: Bench, key: str, limit: int, work: Path) -> dict[str, Any]:
    """The row's record: per task and question, 1 where the answer is right."""
    started = time.monotonic()
    bench.table.update(bench.fitted(BY_KEY[key].reference))
    tasks = task_accuracy(bench.model, bench.tokenizer, list(DATA_SETS), limit, work)
    return {"row": key, "limit": limit, "tasks": tasks, "seconds": round(time.monotonic() - started, 1)}


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy of every row, and its difference to the dense one's in points, paired over questions."""
    found = []
    for record in records:
        base = next((r for r in records if r["row"] == "dense" and r["limit"] == record["limit"]), None)
        if base is None:
            continue
        questions = sum(map(len, record["tasks"].values()))
        row = BY_KEY[record["row"]]
        difference, half = accuracy_difference(record["tasks"], base["tasks"])
        points = "" if row.key == "dense" else f"{100 * difference:+.1f} [{100 * (difference - half):+.1f}, "
        points += "" if row.key == "dense" else f"{100 * (difference + half):+.1f}]"
        found.append(f"| {row.label} (`{row.key}`) | {questions:,} | {mean_accuracy(record):.1%} | {points} |")
    if not found:
        return []
    return [
        f"{len(DATA_SETS)} tasks, zero-shot by lm-eval, validation splits: {', '.join(DATA_SETS)}. The mean over "
        "tasks, and its difference to dense in points with its 95 % interval, paired over questions. Every token is "
        "masked, those of the question as well.",
        "",
        "| row | questions | accuracy | to dense |",
        "|---|---|---|---|",
        *found,
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.map.tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of the dense model")
    parser.add_argument("work", type=Path, help="folder of the map's rows")
    parser.add_argument("--rows", nargs="+", choices=list(BY_KEY), metavar="ROW", default=["dense", "low4@50"])
    parser.add_argument("--limit", type=int, default=300, help="questions of each task")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of all that is computed")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    main()
