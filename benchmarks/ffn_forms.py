"""The contenders of `ffn.py`: FFNs of one shape with random weights, and what limits each.

Axes: T tokens, D model width, F neurons, E experts, U neurons of a union.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from benchmarks.gpu_models import FORMS, Shape, dense_ffn, fresh, spec_of
from torch import Tensor
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moesaic.nn.moesaic_ffn import MoEFeedForward
from moesaic.nn.moesaic_neurons import NeuronFeedForward
from moesaic.nn.moesaic_paths import choose
from moesaic.nn.moesaic_union import build_feed_forward

DENSE, ALL_ROWS = "torch dense", "our kernel, all rows"
ALL_ROWS_UP_TO = 64
"""Tokens; for more, all rows are torch's matter."""
CLUSTERS, TOMOE = "token clusters, union", "ToMoE, union top-1 50 %"
OURS: dict[str, Callable[[int], dict[str, Any]]] = {
    "CMoE S2A2E8, 50 %": FORMS["CMoE S2A2E8"],
    TOMOE: FORMS["union 50 %"],
    **{f"{CLUSTERS} {share} %": lambda d_ff, share=share: _clusters(d_ff, share) for share in (75, 50, 25)},
    "packed top-1 of 16": FORMS["top-1 of 16"],
}
"""Sizes of the experts by F. Members of unions are drawn at random: neighbouring rows do not belong together."""
NEURONS = (50, 25)
"""Percent of the neurons of neuron experts, for one token."""
STOCK = {"eager": None, "grouped_mm": None, "batched_mm": 4}
"""transformers' own experts as S2A2E8, and the most tokens: the last copies the weights once per token and choice."""


class Contender(NamedTuple):
    """Something that computes x_1TD.

    Attributes:
        run: By one of its copies, whose number comes first.
        ffn: A copy of ours, whose path is told.
        limits: Of ours, of x_TD: times as fast as dense if nothing counted but weights that some token wants, and if
            nothing but arithmetic where that is known.
        tokens: The most that it is measured with.
    """

    run: Callable[[int, Tensor], Any]
    ffn: MoEFeedForward | None = None
    limits: Callable[[Tensor], list[float]] | None = None
    tokens: int | None = None


def contenders(shape: Shape, dtype: torch.dtype, copies: int, *, every_path: bool) -> dict[str, Contender]:
    """All of one shape by name, the dense FFN first; ``every_path``: ours by each path that can, besides."""

    def several(make: Callable[[], Any]) -> list[Any]:
        return [fresh(make, dtype, torch.device("cpu")) for _ in range(copies)]

    dense, stock = several(dense_ffn(shape)), several(lambda: _stock(shape))
    found = {DENSE: Contender(lambda i, x: dense[i](x))}
    whole = several(lambda: build_feed_forward(spec_of(FORMS["top-1 of 16"](shape.d_ff)), shape.d_model, "silu"))
    for ffn in whole:
        ffn.all_experts_on, ffn.asked = True, ("rows",)
    if _can(whole[0], shape, dtype, "rows"):
        found[ALL_ROWS] = Contender(lambda i, x: whole[i](x), tokens=ALL_ROWS_UP_TO)
    for name, sizes in OURS.items():
        own = several(lambda sizes=sizes: build_feed_forward(spec_of(sizes(shape.d_ff)), shape.d_model, "silu"))
        found[name] = Contender(lambda i, x, own=own: own[i](x), own[0], partial(_limits, own[0]))
        for path in _paths(own[0]) if every_path else ():
            if _can(own[0], shape, dtype, path):
                found[f"{name}, {path}"] = Contender(partial(_by, own, path))
    single = several(lambda: neuron_ffn(shape))
    for percent in NEURONS:
        top_k = round(percent / 100 * shape.d_ff)
        limits = _neuron_limits(single[0], percent / 100)
        run = partial(_at, single, top_k)
        found[f"neuron experts {percent} %"] = Contender(run, single[0], lambda _, limits=limits: limits, tokens=1)
    for name, most in STOCK.items():
        found[f"transformers, {name}"] = Contender(partial(_implemented, stock, name), tokens=most)
    return found


def neuron_ffn(shape: Shape, bits: int = 4, group: int = 64, *, int8: bool = False) -> NeuronFeedForward:
    """An FFN of neuron experts, whose router alone has random values; in int8 all its codes and scales."""
    parts = ("codes", "scale") if int8 else ("codes", "scale", "offset")
    tensors = ["norm", *(f"{side}_{part}" for side in ("up", "gate") for part in parts)]
    neurons = shape.d_ff
    spec = spec_of({"neurons": neurons, "shared": 0, "experts": neurons, "expert_width": 1, "top_k": 1})
    spec |= {"router": "low_bit", "router_bits": bits, "router_group": group, "router_tensors": tensors}
    spec |= {"weights": "int8"} if int8 else {}
    ffn = build_feed_forward(spec, shape.d_model, "silu")
    assert isinstance(ffn, NeuronFeedForward)
    for name, tensor in ffn.named_buffers():
        if name.endswith("codes"):
            tensor.random_(0, 256)
        else:
            tensor.uniform_(*((-0.1, -0.05) if name.endswith("offset") else (0.005, 0.015)))
    return ffn


def _limits(ffn: MoEFeedForward, x_TD: Tensor) -> list[float]:
    """Linear routers are left out: they are 1 % of the weights at most."""
    idx_TK, _ = ffn.route(x_TD)
    table_EU = getattr(ffn, "membership", None)
    if table_EU is None:
        table_EU = torch.eye(ffn.experts).repeat_interleave(ffn.width, dim=1).bool()
    read = ffn.shared + int(table_EU[idx_TK.unique()].any(0).sum())
    used = ffn.shared + float(table_EU.sum(1)[idx_TK].sum(1).float().mean())
    return [round(ffn.neurons / read, 2), round(ffn.neurons / used, 2)]


def _neuron_limits(ffn: NeuronFeedForward, share: float) -> list[float]:
    """By the weights alone, with the router's. Its arithmetic is not that of the FFN's dtype."""
    router = sum(tensor.nbytes for tensor in ffn.router.buffers()) / (3 * ffn.up_proj.weight.nbytes)
    return [round(1 / (router + share), 2)]


def _clusters(d_ff: int, percent: int) -> dict[str, Any]:
    return FORMS[f"union {percent} %"](d_ff) | {"experts": 128}


def _stock(shape: Shape) -> Qwen2MoeSparseMoeBlock:
    """S2A2E8 as a block of transformers."""
    width = shape.d_ff // 8
    return Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(
            hidden_size=shape.d_model,
            moe_intermediate_size=width,
            shared_expert_intermediate_size=2 * width,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        )
    )


def _paths(ffn: MoEFeedForward) -> list[str]:
    return [row.path.name for row in ffn.table if row.path.layout == ffn.layout]


@torch.no_grad()
def _can(ffn: MoEFeedForward, shape: Shape, dtype: torch.dtype, path: str) -> bool:
    before, ffn.asked = ffn.asked, (path,)
    try:
        choose(torch.zeros(1, shape.d_model, dtype=dtype), ffn)
    except ValueError:
        return False
    finally:
        ffn.asked = before
    return True


def _by(ffns: list[MoEFeedForward], path: str, i: int, x: Tensor) -> Tensor:
    ffns[i].asked = (path,)
    y = ffns[i](x)
    ffns[i].asked = ()
    return y


def _at(ffns: list[NeuronFeedForward], top_k: int, i: int, x: Tensor) -> Tensor:
    ffns[i].top_k = top_k
    return ffns[i](x)


def _implemented(blocks: list[Any], name: str, i: int, x: Tensor) -> Tensor:
    blocks[i].experts.config._experts_implementation = name
    return blocks[i](x)
