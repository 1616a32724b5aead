"""``moesaic eval`` beside a plain loop with transformers over the same windows: CPU seconds a window, and the losses.

    python -m benchmarks.eval_speed MODEL [--windows 4] [--window 1024] [--dtype bfloat16] [--rounds 3]

The plain loop is what the documentation of transformers shows for perplexity: ``model(ids, labels=ids).loss``. Both
run in turn, in one process, on the threads that ``OMP_NUM_THREADS`` gives. CPU time of the whole process counts, so
that other work on the machine disturbs little.

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import conditions
from torch import Tensor

from moesaic.calibration.samples import evaluation_text
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.evaluate.activity import counting
from moesaic.evaluate.perplexity import token_windows, window_loss


@torch.inference_mode()
def plain(model: Any, ids_NW: Tensor) -> list[float]:
    """Summed losses of the windows, by the loss that transformers computes."""
    return [model(ids_W[None], labels=ids_W[None]).loss.item() * (len(ids_W) - 1) for ids_W in ids_NW]


def ours(model: Any, ids_NW: Tensor) -> list[float]:
    """The same, as ``moesaic eval`` computes them."""
    found = []
    for ids_W in ids_NW:
        with counting(model):
            found.append(window_loss(model, ids_W))
    return found


def measure(model: Any, ids_NW: Tensor, rounds: int) -> dict[str, Any]:
    """CPU seconds a window of both, and the largest relative difference of their losses."""
    ways: dict[str, Callable[[Any, Tensor], list[float]]] = {"plain": plain, "ours": ours}
    losses, seconds = {}, {name: [] for name in ways}
    plain(model, ids_NW[:1, :64])
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.process_time()
            losses[name] = way(model, ids_NW)
            seconds[name].append((time.process_time() - started) / len(ids_NW))
    differences = [abs(a / b - 1) for a, b in zip(losses["ours"], losses["plain"], strict=True)]
    return {"seconds": {name: statistics.median(found) for name, found in seconds.items()}, "loss": max(differences)}


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ids_NW = token_windows(load_tokenizer(args.model), evaluation_text(), args.window, args.windows)
    found = measure(load_model(args.model, getattr(torch, args.dtype)), ids_NW, args.rounds)
    seconds = found["seconds"]
    print(
        f"{args.model.name} {args.dtype}, {args.windows} windows of {args.window}: CPU seconds a window: plain "
        f"{seconds['plain']:.2f}, ours {seconds['ours']:.2f} ({seconds['ours'] / seconds['plain']:.2f} times); losses "
        f"differ by {found['loss']:.1e}. {conditions('process')}"
    )


if __name__ == "__main__":
    main()
