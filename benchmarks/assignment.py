"""Balanced assignment: min-cost flow against LAPJV on repeated columns. Time, memory, and whether the optima agree.

    python -m benchmarks.assignment [--rows 12544] [--columns 14] [--lapjv-rows 2016]

Costs are L1 distances between marker columns, as CMoE has them (integers), and the same with noise (reals). Each solve
runs in a process of its own; memory is the growth of its peak resident set. LAPJV needs rows^2 floats and, where many
costs are equal, minutes: it gets ``--lapjv-rows`` rows. Give it all of them to compare at full size.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moesaic.solvers.assignment import balanced_assignment
from moesaic.solvers.markers import Markers, cluster_counts, column_distances

TOKENS = 4096
MARKERS = 10


def marker_costs(rows: int, columns: int, *, real: bool) -> Tensor:
    """Distances [rows, columns] of random marker columns of very different rates to those of the highest rates."""
    generator = torch.Generator().manual_seed(0)
    log_rate_F = torch.randn(rows, generator=generator)
    noise_TF = torch.rand(TOKENS, rows, generator=generator).clamp_(min=1e-12).log_().neg_().log_()
    idx_TK = noise_TF.neg_().add_(log_rate_F).topk(MARKERS, dim=1).indices.sort(dim=1).values
    markers = Markers(idx_TK, rows)
    label_F = torch.full((rows,), -1)
    label_F[markers.counts.argsort(descending=True, stable=True)[:columns]] = torch.arange(columns)
    costs = column_distances(markers, cluster_counts(markers, label_F, columns), torch.ones(columns))
    return costs + torch.rand(costs.shape, generator=generator, dtype=torch.float64) if real else costs


def capacities(rows: int, columns: int) -> list[int]:
    """Sizes that differ by at most one."""
    return [rows // columns + (column < rows % columns) for column in range(columns)]


def flow(costs: Tensor) -> Tensor:
    """Labels by :func:`balanced_assignment`."""
    return balanced_assignment(costs, capacities(*costs.shape))


def lapjv(costs: Tensor) -> Tensor:
    """Labels by scipy's Jonker-Volgenant on a square matrix, each column repeated to its capacity."""
    from scipy.optimize import linear_sum_assignment

    owner = np.repeat(np.arange(costs.shape[1]), capacities(*costs.shape))
    return torch.from_numpy(owner[linear_sum_assignment(costs.numpy()[:, owner])[1]])


SOLVERS: dict[str, Callable[[Tensor], Tensor]] = {"min-cost flow": flow, "LAPJV": lapjv}


def peak_megabytes() -> float:
    """Peak resident set of this process (Linux; unlike getrusage's it does not count the parent's before exec)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(solver: str, costs_NE: np.ndarray) -> tuple[float, float, float, float]:
    """Seconds, CPU seconds, peak memory growth in MB and total cost of one solve."""
    costs = torch.from_numpy(costs_NE)
    SOLVERS[solver](costs[: 2 * costs.shape[1]])  # imports
    before = peak_megabytes()
    start, start_cpu = time.perf_counter(), time.process_time()
    labels = SOLVERS[solver](costs)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    growth = peak_megabytes() - before
    return seconds, cpu, growth, costs.gather(1, labels[:, None]).sum().item()


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12544, help="neurons to assign")
    parser.add_argument("--columns", type=int, default=14, help="experts")
    parser.add_argument("--lapjv-rows", type=int, default=2016, help="rows of the comparison with LAPJV")
    args = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("ortools", "scipy", "torch"))
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {versions}\n")
    print("| rows x columns | costs | solver | seconds | CPU seconds | memory MB | optimum |")
    print("|---|---|---|---|---|---|---|")
    runs = dict.fromkeys([("min-cost flow", args.rows), ("min-cost flow", args.lapjv_rows), ("LAPJV", args.lapjv_rows)])
    for real in (False, True):
        for solver, rows in runs:
            costs = marker_costs(rows, args.columns, real=real).numpy()
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, cpu, megabytes, total = pool.apply(measure, (solver, costs))
            label = f"{rows} x {args.columns} | {'real' if real else 'integer'} | {solver}"
            print(f"| {label} | {seconds:.3f} | {cpu:.3f} | {megabytes:.0f} | {total:.6f} |")


if __name__ == "__main__":
    main()
