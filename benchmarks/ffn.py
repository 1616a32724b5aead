"""How fast is one converted FFN on a CPU, beside torch's dense FFN, our own kernel and transformers' own experts?

    python -m benchmarks.ffn [--minutes 20] [--threads 2] [--report docs/results/ffn] [--log build/ffn.jsonl]
    python -m benchmarks.ffn --shapes "896 x 4864" --dtypes bfloat16 --tokens 1 16 512 --paths

For each shape, dtype and number of tokens all forms of experts take turns (`ffn_forms.py`), by the paths that the
runtime chooses; with `--paths` also by each path of its table. Each round has new inputs and an order of its own.
So many copies of the weights take turns that none is still in a cache. Weights lie as they do after a first token.

Reported are microseconds, minimum and median, and how many times as fast as dense: the ratio of the minima, and the
median of the ratios within a round. A row is written to the log as soon as it is measured. The same command goes on
where the last one stopped, if machine, versions and the runtime's code are the same. `--report` is written anew after
each row.

Axes: T tokens, D model width.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from benchmarks.ffn_forms import DENSE, Contender, contenders
from benchmarks.ffn_page import markdown
from benchmarks.gpu_models import SHAPES, Shape
from benchmarks.machine import CLOCKS, conditions
from benchmarks.rows import write_rows

from moesaic.durable import replace_text
from moesaic.nn.moesaic_measured import measured
from moesaic.nn.moesaic_paths import choose

TOKENS = (1, 2, 4, 16, 64, 512, 4096)
ORDER = (
    ("qwen2.5-0.5b", "bfloat16"),
    ("smollm2-135m", "bfloat16"),
    ("smollm2-135m", "float32"),
    ("qwen2.5-0.5b", "float32"),
    ("qwen2.5-1.5b", "bfloat16"),
    ("qwen2.5-7b", "bfloat16"),
    ("qwen2.5-1.5b", "float32"),
    ("qwen2.5-7b", "float32"),
)
"""Shapes and dtypes, those first that decide most."""
TOGETHER = 512 * 2**20  # bytes of all copies of all contenders, more than any cache holds
FEWEST = 3
"""Rounds of a row; one more warms up."""
Row = dict[str, Any]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    known = all(measured(getattr(torch, name), args.threads) is not None for name in ("bfloat16", "float32"))
    found = conditions(args.clock) | {"paths_measured": known}
    rows = [line["row"] for line in _lines(args.log) if line["conditions"] == found]
    _report(args, found, rows)
    measure(args, found, rows)
    left_out = [
        f"{shape.ffn} {dtype} {tokens}"
        for shape, dtype in _order(args)
        for tokens in args.tokens
        if not _has(rows, shape, dtype, tokens)
    ]
    print(markdown(rows, found))
    print(f"\nLeft out, as the minutes were over: {', '.join(left_out) or 'nothing'}")


def measure(args: argparse.Namespace, found: dict[str, Any], rows: list[Row]) -> None:
    """Add the rows that are missing to ``rows`` and to the log, until the minutes are over."""
    deadline = time.monotonic() + 60 * args.minutes
    for shape, dtype in _order(args):
        missing = [tokens for tokens in args.tokens if not _has(rows, shape, dtype, tokens)]
        if not missing or time.monotonic() > deadline:
            continue
        each = 3 * shape.d_model * shape.d_ff * getattr(torch, dtype).itemsize
        copies = max(1, TOGETHER // (10 * each))
        own = contenders(shape, getattr(torch, dtype), copies, every_path=args.paths)
        _lay(own, shape, getattr(torch, dtype), copies)
        pace = 0.0  # seconds of a round and token, of fewer tokens: so that of more is less
        for tokens in missing:
            left = deadline - time.monotonic()
            if (1 + FEWEST) * pace * tokens > left:
                continue
            turns = {name: one for name, one in own.items() if one.tokens is None or tokens <= one.tokens}
            row = _row(turns, args, shape, dtype, tokens, copies, left)
            if row is None:
                continue
            pace = sum(median for _, median in row["micros"].values()) / 1e6 / tokens
            rows.append(row)
            _write(args, found, rows)


@torch.inference_mode()
def _lay(own: dict[str, Contender], shape: Shape, dtype: torch.dtype, copies: int) -> None:
    """A first token, through every copy."""
    for one in own.values():
        for i in range(copies):
            one.run(i, torch.randn(1, 1, shape.d_model).to(dtype))


@torch.inference_mode()
def _row(
    turns: dict[str, Contender],
    args: argparse.Namespace,
    shape: Shape,
    dtype: str,
    tokens: int,
    copies: int,
    left: float,
) -> Row | None:
    """A finished row, or None where the seconds ``left`` are too few."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    clock, shuffled = CLOCKS[args.clock], random.Random(0)
    begin, x_1TD, rounds = time.monotonic(), torch.empty(0), 0
    for turn in count():
        x_1TD = torch.randn(1, tokens, shape.d_model).to(getattr(torch, dtype))
        for name in shuffled.sample(list(turns), len(turns)):
            since = clock()
            turns[name].run(turn % copies, x_1TD)
            if turn:
                seconds[name].append(clock() - since)
        passed = time.monotonic() - begin
        if not turn and FEWEST * passed > left:
            return None
        rounds = turn
        if turn >= args.rounds or (turn >= FEWEST and passed > min(args.seconds, left)):
            break
    return {
        "shape": shape.ffn,
        "dtype": dtype,
        "tokens": tokens,
        "rounds": rounds,
        "micros": {name: [round(1e6 * function(own), 1) for function in BOTH] for name, own in seconds.items()},
        "times_dense": {name: ratios(seconds[DENSE], own) for name, own in seconds.items() if name != DENSE},
        "path": {name: choose(x_1TD[0], one.ffn).name for name, one in turns.items() if one.ffn is not None},
        "limits": {name: one.limits(x_1TD[0]) for name, one in turns.items() if one.limits is not None},
    }


BOTH: tuple[Callable[[list[float]], float], ...] = (min, statistics.median)


def ratios(dense: list[float], own: list[float]) -> list[float]:
    """How many times as fast: of the minima, and the median within a round."""
    within = [other / mine for other, mine in zip(dense, own, strict=True)]
    return [round(min(dense) / min(own), 3), round(statistics.median(within), 3)]


def _order(args: argparse.Namespace) -> list[tuple[Shape, str]]:
    return [
        (SHAPES[name], dtype)
        for name, dtype in ORDER
        if dtype in args.dtypes and (not args.shapes or SHAPES[name].ffn in args.shapes)
    ]


def _has(rows: list[Row], shape: Shape, dtype: str, tokens: int) -> bool:
    return any((row["shape"], row["dtype"], row["tokens"]) == (shape.ffn, dtype, tokens) for row in rows)


def _lines(log: Path) -> list[dict[str, Any]]:
    """Whole lines; a run that was killed may have left a part of one."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n") and line.strip()]


def _write(args: argparse.Namespace, found: dict[str, Any], rows: list[Row]) -> None:
    row = rows[-1]
    args.log.parent.mkdir(parents=True, exist_ok=True)
    before = "".join(f"{json.dumps(line)}\n" for line in _lines(args.log))
    replace_text(args.log, f"{before}{json.dumps({'conditions': found, 'row': row})}\n")
    dense = row["micros"][DENSE]
    print(f"{row['shape']} {row['dtype']} {row['tokens']}: dense {dense[0]:.0f} us, {row['times_dense']}", flush=True)
    _report(args, found, rows)


def _report(args: argparse.Namespace, found: dict[str, Any], rows: list[Row]) -> None:
    if args.report is not None and rows:
        write_rows(args.report.with_suffix(".json"), {"conditions": found, "rows": rows})
        replace_text(args.report.with_suffix(".md"), markdown(rows, found) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="then no further row is begun")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--shapes", nargs="+", choices=[shape.ffn for shape in SHAPES.values()], help="default: all")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--seconds", type=float, default=8.0, help="of a row, where its fewest rounds take less")
    parser.add_argument("--rounds", type=int, default=200, help="the most of a row")
    parser.add_argument("--paths", action="store_true", help="also each path alone")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: for a busy machine and 1 thread")
    parser.add_argument("--log", type=Path, default=Path("build/ffn.jsonl"))
    parser.add_argument("--report", type=Path, help="write REPORT.json and REPORT.md there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
