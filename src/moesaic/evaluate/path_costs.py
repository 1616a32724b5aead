"""Measures what the runtime's paths cost on this machine (`nn/moesaic_costs.py`), in seconds.

Minima of a few turns, each over other weights than the last, so that they come from memory as in use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import nn

from moesaic.nn.moesaic_costs import TOKENS, Costs
from moesaic.nn.moesaic_ffn import MoEFeedForward, use_path
from moesaic.nn.moesaic_union import build_feed_forward

WIDTHS = (512, 2048)
"""D and F of the FFNs that are measured."""
COPIES = 6
SECONDS = 0.04  # for one number, after at least as many turns as there are copies


def measure(dtype: torch.dtype) -> Costs:
    """Constants for weights of ``dtype`` with torch's present number of threads."""
    d_model, d_ff = WIDTHS
    ffns = [_ffn(d_model, dtype, neurons=d_ff, experts=1, expert_width=d_ff) for _ in range(COPIES)]
    weights = 3 * d_model * d_ff
    for ffn in ffns:
        ffn.all_experts_on = True
    with torch.inference_mode():
        rows, dense = (_products(ffns, name, dtype) for name in ("rows", "every"))
        for ffn in ffns:
            ffn.all_experts_on = False  # this path is one of routed experts
        fused = _products(ffns, "fused", dtype)
        some = torch.randperm(d_ff)[: d_ff // 2].sort().values
        sides = cycle(ffns)
        copied = _fastest(lambda: next(sides).up_proj.weight.index_select(0, some))
        narrow = _ffn(64, dtype, neurons=128, experts=32, expert_width=4)
        x_TD = torch.randn(128, 64).to(dtype)
        with use_path(narrow, "sorted"):
            call = _fastest(lambda: narrow(x_TD))
    per_dense, per_row, per_fused = (
        tuple(nanoseconds / weights for nanoseconds in found) for found in (dense, rows, fused)
    )
    return Costs(per_dense, per_row, per_fused, copied / (d_model * len(some)), call / 32)


def small_ffn(dtype: torch.dtype) -> MoEFeedForward:
    """Eight experts, of which a token uses two."""
    return _ffn(128, dtype, neurons=512, experts=8, expert_width=64, top_k=2)


def _products(ffns: list[MoEFeedForward], path: str, dtype: torch.dtype) -> list[float]:
    found = []
    for tokens in TOKENS:
        x_TD, turns = torch.randn(tokens, WIDTHS[0]).to(dtype), cycle(ffns)

        def once(x_TD: torch.Tensor = x_TD, turns: Any = turns) -> None:
            next(turns)(x_TD)

        for ffn in ffns:
            ffn.asked = (path,)
        found.append(_fastest(once))
    return found


def _fastest(once: Callable[[], Any]) -> float:
    """Nanoseconds, after one turn to warm up. A single thread is timed by the time that the processor gave it."""
    clock = time.process_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    once()
    found: list[int] = []
    while len(found) < COPIES or sum(found) < 1e9 * SECONDS:
        begin = clock()
        once()
        found.append(clock() - begin)
    return float(min(found))


def _ffn(d_model: int, dtype: torch.dtype, **sizes: int) -> MoEFeedForward:
    spec = {
        **{"shared": 0, "top_k": 1, "router": "linear", "router_tensors": ["weight"], "normalise_input": False},
        **{"gate": "uniform", "selection_bias": False, "gated": True},
        **{"gate_bias": False, "up_bias": False, "down_bias": False},
    }
    ffn = build_feed_forward(spec | sizes, d_model, "silu")
    for parameter in ffn.parameters():
        nn.init.normal_(parameter, std=0.02)
    return ffn.to(dtype).requires_grad_(False)
