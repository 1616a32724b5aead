"""Task accuracy of rows of the map: every token masked, so that answers are those of decoding.

Needs lm-eval and its data: see `benchmarks/compare/tasks.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.table import accuracy_difference, mean_accuracy
from benchmarks.compare.tasks import DATA_SETS, task_accuracy
from benchmarks.map.measure import Bench
from benchmarks.map.rows import BY_KEY, Row

FILE = "tasks.jsonl"
"""In WORK: a line for every row whose questions are answered."""


def answered(bench: Bench, row: Row, limit: int, work: Path) -> dict[str, Any]:
    """The row's record: of the first ``limit`` questions of each task, 1 where the answer is right."""
    started = time.monotonic()
    bench.table.update(bench.fitted(row.reference))
    tasks = task_accuracy(bench.model, bench.tokenizer, list(DATA_SETS), limit, work)
    return {"row": row.key, "limit": limit, "tasks": tasks, "seconds": round(time.monotonic() - started, 1)}


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy of every row, and its difference to the dense one's in points, paired over questions."""
    found = []
    for record in records:
        base = next((r for r in records if r["row"] == "dense" and r["limit"] == record["limit"]), None)
        if base is not None:
            found.append(_line(record, base))
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


def _line(record: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    row, questions = BY_KEY[record["row"]], sum(map(len, record["tasks"].values()))
    middle, half = (100 * value for value in accuracy_difference(record["tasks"], base["tasks"]))
    points = "" if record is base else f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"
    return f"| {row.label} (`{row.key}`) | {questions:,} | {mean_accuracy(dict(record)):.1%} | {points} |"
