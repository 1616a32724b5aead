"""The campaign's figures as a table and as a page."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.rows import write_rows

import moesaic
from moesaic.cli.console import table as aligned

_HEADERS = ["what", "on", "rounds", "with faults", "slowest refusal"]


def _groups(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if " done at " not in row["key"]:
            part = f"kill, {row['signal']}" if row["part"] == "kill" else row["part"]
            groups.setdefault((part, row.get("verb") or row.get("input") or row["target"]), []).append(row)
    lines = []
    for (part, on), found in groups.items():
        seconds = [row["seconds"] for row in found if "seconds" in row and row["part"] == "malformed"]
        bad = sum(bool(row["faults"]) for row in found)
        count = f"{sum(row['runs'] for row in found):,} inputs" if part == "fuzz" else str(len(found))
        lines.append([part, on, count, str(bad), f"{max(seconds):.2f} s" if seconds else ""])
    return lines


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For a terminal."""
    return aligned(_HEADERS, _groups(rows), "<<>>>")


def write_page(report: Path, rows: Sequence[dict[str, Any]]) -> None:
    """REPORT.md and REPORT.json, one round a line."""
    write_rows(report.with_suffix(".json"), rows)
    report.with_suffix(".md").write_text(_markdown(rows), encoding="utf-8")


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    kills = [row for row in rows if row["part"] == "kill"]
    found = {name: sum(row["found"] == name for row in kills) for name in ("absent", "partial", "complete")}
    bad = [row for row in rows if row["faults"]]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
    lines = [
        "# Reliability",
        "",
        "    python -m benchmarks.reliability --report docs/results/reliability",
        "",
        "Written by that command. All runs are the real command line on tiny models in bf16.",
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores; moesaic "
        f"{moesaic.__version__}, {libraries}.",
        "",
        f"| {' | '.join(_HEADERS)} |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(line)} |" for line in _groups(rows)),
        "",
        "What counts as a fault:",
        "",
        "* **kill**: a signal at a random moment of a run (SIGINT goes to all its processes, as Ctrl-C). Then the "
        "output is absent or complete; nothing stays in the folder for temporary files, in shared memory or among the "
        "processes; the same command ends with the bytes of an undisturbed run (of results.json, without timings). "
        f"Found after {len(kills)} kills: {found['absent']} times nothing, {found['partial']} times an unfinished "
        f"output, {found['complete']} times the whole output.",
        "* **full disk**: from one file operation on, every write fails with ENOSPC; also file-size limits of the "
        "system. **read-only**: the same with EROFS. **vanished**: the source, the unfinished output or the whole "
        "folder is removed in the middle. Wanted: one plain error, exit code 4 for a full disk, and the right bytes "
        "from the same command afterwards.",
        "* **two processes**: a run is stopped in the middle, the same command is run beside it, the first goes on. "
        "The second is refused (of eval: both end), the output is right.",
        "* **malformed**: one file of a dense folder, a conversion or a GGUF file, damaged by a seeded generator (bit "
        "flips, truncation, shapes, header lengths, offsets, NaN, names that lead outside, JSON of other types, deep "
        "nesting, keys twice). Wanted: one plain error within a second of moesaic's own CPU time, measured in a fork "
        "of a process with all modules loaded. What is converted after all must be undone into the tensors that the "
        "file holds, and load in transformers with no tensor missing.",
        "* **fuzz**: inputs made by atheris from valid ones. Wanted: an error of moesaic's own kinds, or success.",
        "",
    ]
    if bad:
        lines += ["## Found", "", *(f"* {row['key']}: {'; '.join(row['faults'])}" for row in bad), ""]
    return "\n".join(lines)
