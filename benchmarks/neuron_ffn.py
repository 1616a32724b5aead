"""How fast is one FFN of neuron experts beside the dense FFN, and beside torch's weight-only products, on a CPU?

    python -m benchmarks.neuron_ffn [--threads 2] [--shape 896 4864] [--tokens 1 4] [--bits 4 3] [--json out.json]

Rows: torch's dense FFN in bf16; our kernel with all rows; torch's products of int8 and 4-bit weights; the kernel of
neuron experts at each share, and its scores with a single neuron; the same of weights in int8 (`nested`), whose high
halves are the router. Weights are random, so chosen neurons lie anywhere.

Each contender has `--copies` FFNs and takes them in turn, so that no weight is still in a cache. All contenders take
turns in an order that is shuffled anew. Reported are microseconds, minimum and median; how many times as fast as the
dense FFN, by both; the bytes that one token must read, and what that makes per second.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.ffn_forms import neuron_ffn
from benchmarks.gpu_models import Shape, dense_ffn, fresh
from benchmarks.machine import CLOCKS, cpu_name
from benchmarks.rows import write_rows
from benchmarks.weight_only import WEIGHT_ONLY, quantised
from torch import Tensor

from moesaic.nn.moesaic_ffn import MoEFeedForward

DENSE = "torch dense"
Run = Callable[[int, Tensor], Any]


def contenders(args: argparse.Namespace) -> dict[str, tuple[Run, float]]:
    """Computes an input by one of its copies; bytes that a token reads."""
    shape = Shape(*args.shape)
    d_model, neurons, *_ = shape
    dense = _several(args, dense_ffn(shape))
    weights, of = 3 * d_model * neurons, lambda modules: lambda i, x_TD: modules[i](x_TD)
    found: dict[str, tuple[Run, float]] = {DENSE: (of(dense), 2 * weights)}
    for kind in WEIGHT_ONLY:
        bits = 8 if kind == "int8" else 4.5
        found[f"torch {kind}"] = of([quantised(ffn, kind) for ffn in dense]), bits / 8 * weights
    for bits in args.bits:
        ffns = _several(args, lambda bits=bits: neuron_ffn(shape, bits, args.group))
        router = 2 * neurons * (d_model * bits / 8 + -(-d_model // args.group) * 4) + 4 * neurons
        if bits == args.bits[0]:
            found["kernel, all rows"] = _all_rows(ffns), 2 * weights
        found[f"{bits} bits, scores alone"] = _at(ffns, 1), router
        for share in args.active:
            found[f"{bits} bits, {100 * share:.0f} %"] = _at(ffns, round(share * neurons)), router + 2 * weights * share
    nested = _several(args, lambda: neuron_ffn(shape, int8=True))
    groups = -(-d_model // 64)
    high, rest = 2 * neurons * (d_model / 2 + 2 * groups) + 4 * neurons, neurons * (2 * d_model + 2 * groups)
    found["nested, scores alone"] = _at(nested, 1), high
    for share in (1.0, *args.active):
        found[f"nested, {100 * share:.0f} %"] = _at(nested, round(share * neurons), ("rows",)), high + rest * share
    return found


def _several(args: argparse.Namespace, make: Callable[[], Any]) -> list[Any]:
    return [fresh(make, torch.bfloat16, torch.device("cpu")) for _ in range(args.copies)]


def _at(ffns: list[MoEFeedForward], top_k: int, asked: tuple[str, ...] = ()) -> Run:
    def run(i: int, x_TD: Tensor) -> Tensor:
        ffns[i].top_k, ffns[i].asked = top_k, asked
        return ffns[i](x_TD)

    return run


def _all_rows(ffns: list[MoEFeedForward]) -> Run:
    def run(i: int, x_TD: Tensor) -> Tensor:
        ffns[i].all_experts_on, ffns[i].asked = True, ("rows",)
        y_TD = ffns[i](x_TD)
        ffns[i].all_experts_on, ffns[i].asked = False, ()
        return y_TD

    return run


@torch.inference_mode()
def measure(args: argparse.Namespace, found: dict[str, tuple[Run, float]], tokens: int) -> dict[str, list[float]]:
    """Seconds of every call. One round more warms up."""
    shuffled, clock = random.Random(0), CLOCKS[args.clock]
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(args.rounds + 1):
        for name in shuffled.sample(list(found), len(found)):
            x_LTD = torch.randn(args.copies, tokens, args.shape[0]).bfloat16()
            for i, x_TD in enumerate(x_LTD):
                begin = clock()
                found[name][0](i, x_TD)
                if turn:
                    seconds[name].append(clock() - begin)
    return seconds


def rows_of(found: dict[str, tuple[Run, float]], seconds: dict[str, list[float]], tokens: int) -> list[dict[str, Any]]:
    """A row per contender."""
    least, middle = min(seconds[DENSE]), statistics.median(seconds[DENSE])
    return [
        {
            **{"tokens": tokens, "name": name, "min_us": round(1e6 * min(own), 1)},
            **{"median_us": round(1e6 * statistics.median(own), 1), "times_dense_min": round(least / min(own), 2)},
            **{"times_dense_median": round(middle / statistics.median(own), 2), "mb": round(found[name][1] / 1e6, 2)},
            "gb_per_s": round(found[name][1] / min(own) / 1e9, 1),
        }
        for name, own in seconds.items()
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| tokens | | us, min | median | times dense, of minima | of medians | MB per token | GB/s |",
        "|---" * 8 + "|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(str(cell) for cell in row.values())} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--shape", type=int, nargs=2, default=[896, 4864], metavar=("D", "F"), help="of SmolLM2: 576 1536"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3], choices=[2, 3, 4])
    parser.add_argument("--group", type=int, default=64, choices=[32, 64, 128])
    parser.add_argument("--active", type=float, nargs="+", default=[0.5, 0.33, 0.25])
    parser.add_argument("--copies", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: for a busy machine and 1 thread")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = contenders(args)
    rows = [row for tokens in args.tokens for row in rows_of(found, measure(args, found, tokens), tokens)]
    conditions = {
        **{"cpu": cpu_name(), "threads": args.threads, "clock": args.clock, "shape": args.shape, "group": args.group},
        **{"copies": args.copies, "rounds": args.rounds, "dtype": "bfloat16", "torch": torch.__version__},
    }
    print(", ".join(f"{key} {value}" for key, value in conditions.items()), end="\n\n")
    print(markdown(rows))
    if args.json is not None:
        write_rows(args.json, {"conditions": conditions, "rows": rows})


if __name__ == "__main__":
    main()
