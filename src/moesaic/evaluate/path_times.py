"""Measures which of the runtime's paths is the fastest on this machine (`nn/moesaic_measured.py`), in half a minute.

FFNs of a middle size, half of whose neurons a token uses. Paths take turns, each over other weights than the last, so
that they come from memory as in use, and lie as they do after a first token.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from moesaic.nn.moesaic_ffn import MoEFeedForward, use_path
from moesaic.nn.moesaic_measured import LAYOUTS, TOKENS, Fastest
from moesaic.nn.moesaic_paths import PATHS
from moesaic.nn.moesaic_union import UnionFeedForward, build_feed_forward

WIDTHS = (896, 4864)
"""D and F of the FFNs that are measured."""
COPIES = 4
SECONDS = 0.4  # for one number of tokens, after at least as many turns as there are copies
HOPELESS = 2  # times as slow as the fastest after two turns: not tried again


def measure(dtype: torch.dtype) -> Fastest:
    """The fastest path for weights of ``dtype`` with torch's present number of threads."""
    return {layout: tuple(_fastest(layout, dtype)) for layout in LAYOUTS}


def small_ffn(dtype: torch.dtype) -> MoEFeedForward:
    """Eight experts, of which a token uses two."""
    return _ffn((128, 512), dtype, "packed")


def _fastest(layout: str, dtype: torch.dtype) -> list[str]:
    ffns = [_ffn(WIDTHS, dtype, layout) for _ in range(COPIES)]
    names = [row.path.name for row in PATHS if row.path.layout == layout]
    with torch.inference_mode():
        able = [name for name in names if _can(ffns, name, dtype)]
        return [_fastest_of(able, ffns, torch.randn(tokens, WIDTHS[0]).to(dtype)) for tokens in TOKENS]


def _fastest_of(names: list[str], ffns: list[MoEFeedForward], x_TD: torch.Tensor) -> str:
    best: dict[str, float] = {}
    begin, turn = time.perf_counter(), 0
    while turn < COPIES or time.perf_counter() - begin < SECONDS:
        for name in names:
            seconds = _seconds(ffns[turn % COPIES], name, x_TD)
            best[name] = min(seconds, best.get(name, seconds))
        if turn:
            names = [name for name in names if best[name] < HOPELESS * min(best.values())]
        turn += 1
    return min(best, key=lambda name: best[name])


def _can(ffns: list[MoEFeedForward], name: str, dtype: torch.dtype) -> bool:
    """Whether the path can compute this; then each FFN has done it once."""
    x_TD = torch.zeros(1, WIDTHS[0], dtype=dtype)
    try:
        for ffn in ffns:
            _seconds(ffn, name, x_TD)
    except ValueError:
        return False
    return True


def _seconds(ffn: MoEFeedForward, name: str, x_TD: torch.Tensor) -> float:
    """A single thread is timed by the time that the processor gave it."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with use_path(ffn, name):
        begin = clock()
        ffn(x_TD)
        return clock() - begin


def _ffn(widths: tuple[int, int], dtype: torch.dtype, layout: str) -> MoEFeedForward:
    """Two of eight parts of the neurons are shared, and two of the other six chosen; or one of 128 halves of all."""
    d_model, d_ff = widths
    packed = {"shared": d_ff // 4, "experts": 6, "top_k": 2, "expert_width": d_ff // 8}
    union = {"shared": 0, "experts": 128, "top_k": 1, "expert_width": d_ff // 2, "union": True, "neurons": d_ff}
    spec: dict[str, Any] = {
        **{"router": "linear", "router_tensors": ["weight"], "normalise_input": False, "gated": True},
        **{"gate": "uniform", "selection_bias": False},
        **{"gate_bias": False, "up_bias": False, "down_bias": False},
    }
    ffn = build_feed_forward(spec | (union if layout == "union" else packed | {"neurons": d_ff}), d_model, "silu")
    for parameter in ffn.parameters():
        nn.init.normal_(parameter, std=0.02)
    if isinstance(ffn, UnionFeedForward):
        ffn.membership.copy_(torch.rand(ffn.membership.shape) < 0.5)
    return ffn.to(dtype).requires_grad_(False)
