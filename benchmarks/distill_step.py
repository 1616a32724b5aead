"""One training step of a distilled student: the chosen neurons gathered, against all neurons computed densely.

Side by side, the same weights and batch, interleaved repetitions, medians. A step is forward, backward and Adam. The
dense step computes all m logits and all m neurons and zeroes what was not chosen. Run as
``python -m benchmarks.distill_step --threads 1 [--json FILE]``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.rows import write_rows
from torch import Tensor

from moesaic.distill.spec import StudentSpec, costs
from moesaic.distill.student import MoEStudent


def stepper(
    model: MoEStudent,
    forward: Callable[[Tensor], Tensor],
    x_TD: Tensor,
    y_TD: Tensor,
    clock: Callable[[], float],
) -> Callable[[], float]:
    """A function that does one training step and returns its seconds; Adam's moments are already there."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    optimiser.zero_grad()

    def step() -> float:
        started = clock()
        (forward(x_TD) - y_TD).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        return clock() - started

    return step


def measure(router: str, args: argparse.Namespace) -> dict[str, float | str]:
    """Median seconds of both steps for one router, and the largest difference of their outputs."""
    spec = StudentSpec(shared=args.k, experts=args.m, top_k=args.k, router=router, rank=args.rank)  # type: ignore[arg-type]
    model = MoEStudent(spec, args.d)
    generator = torch.Generator().manual_seed(0)
    x_TD, y_TD = (torch.randn(args.batch, args.d, generator=generator) for _ in range(2))
    with torch.no_grad():
        difference = float((model(x_TD[:32]) - model.dense_forward(x_TD[:32])).abs().max())
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    gathered = stepper(model, model.forward, x_TD, y_TD, clock)
    dense = stepper(model, model.dense_forward, x_TD, y_TD, clock)
    gathered()
    times = [(gathered(), dense()) for _ in range(args.repeats)]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "router": router,
        "parameters": costs(spec, args.d).parameters,
        "gathered_seconds": ours,
        "dense_seconds": theirs,
        "ratio": theirs / ours,
        "difference": difference,
    }


def main() -> None:
    """Print a line per router."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--m", type=int, default=100_000, help="experts of one neuron")
    parser.add_argument("--k", type=int, default=256, help="active experts, and shared width")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--d", type=int, default=576, help="model width")
    parser.add_argument("--rank", type=int, default=144, help="rank of the low_rank and product routers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of one thread on a busy machine")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"m {args.m}, k {args.k}, batch {args.batch}, d {args.d}, fp32, {args.threads} threads, {args.clock} clock")
    rows = []
    for router in ("product", "low_rank", "full"):
        row = measure(router, args)
        rows.append(row)
        print(
            f"{router:9} gathered {row['gathered_seconds']:.3f} s, dense {row['dense_seconds']:.3f} s, "
            f"{row['ratio']:.1f}x, outputs differ by {row['difference']:.1e}",
            flush=True,
        )
    if args.json is not None:
        write_rows(args.json, {"settings": {**vars(args), "json": None}, "rows": rows})


if __name__ == "__main__":
    main()
