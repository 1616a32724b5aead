"""What an architecture can hold, as data. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesaic.anatomy.base import QKNorm


@dataclass(frozen=True)
class Limits:
    """What fits into an architecture, in every engine that loads it.

    Attributes:
        qkv_bias, o_bias: Biases of these projections.
        qk_norm: Norms of queries and keys that it computes; one that is missing here cannot be left out or added.
        post_norm: Whether norms stand after attention and FFN; if not, before.
        any_head_dim: Heads whose widths do not add up to the model's.
        partial_rotary, window, multipliers: See :class:`Backbone`.
        shared_expert: It has a shared expert; if not, every routed one gets a copy of the shared neurons.
        dense_layers: Where layers may stay dense.
        unequal_layers: Layers may differ in number of experts and top-k.
        softmax_topk: Experts can be weighed by the softmax over the chosen scores.
        sigmoid: Experts can be weighed by 2 sigmoid(z), with a selection bias on the sigmoid of the scores.
        router_bias: The router's bias, where weights are 1.
        selection_bias: A bias added to the softmax of the scores for choosing.
        output_bias: A bias of the FFN's output.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: tuple[QKNorm, ...] = ("none",)
    post_norm: bool = False
    any_head_dim: bool = True
    partial_rotary: bool = False
    window: bool = False
    multipliers: bool = False
    shared_expert: bool = True
    dense_layers: Literal["none", "leading", "any"] = "none"
    unequal_layers: bool = False
    softmax_topk: bool = True
    sigmoid: bool = False
    router_bias: bool = False
    selection_bias: bool = False
    output_bias: bool = False
