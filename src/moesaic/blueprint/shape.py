"""What one FFN becomes, in numbers of neurons and in kinds: from the options alone, or of a plan. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moesaic.blueprint.layout import Layout

RouterKind = Literal["static", "linear", "low_rank", "gated", "low_bit"]
GateKind = Literal["uniform", "scaled", "softmax_topk", "sigmoid"]
COPIES: frozenset[RouterKind] = frozenset({"low_bit"})
"""Routers that are copies of their FFN's weights. They are no parameters wherever these are counted: said are bytes."""
BLOCK = 64
"""Weights of a row that a ``low_bit`` router packs together; rows are padded to a multiple of it."""


def row_bytes(d_model: int, bits: int) -> int:
    """Bytes of a packed row of ``d_model`` codes."""
    return -(-d_model // BLOCK) * BLOCK * bits // 8


def row_groups(d_model: int, group: int) -> int:
    """Groups of ``group`` weights in a row, the last one perhaps shorter: each has a scale and an offset."""
    return -(-d_model // group)


@dataclass(frozen=True)
class FFNShape:
    """The parts of one FFN. Forecasts, targets and early checks read this and nothing else.

    Attributes:
        d_ff: Neurons F of the dense FFN.
        shared: Neurons that every token uses.
        own: Neurons of each routed expert. Before a decision without the padding to a common width; where experts have
            free widths, their mean over tokens.
        top_k: Experts per token.
        router: How they are chosen; ``static`` where there are none.
        gate: How they are weighed; ``uniform`` where that is 1 for other reasons, such as scales of zero.
        rewritten: Matrices of each neuron that are new numbers, which the blueprint then holds: 1 is a refitted down
            projection, 3 all of a gated FFN.
        union: Most neurons that all experts have together, where these are stored once; None: a copy for each.
        varied: Widths of a union's experts differ.
        normalised: The router reads inputs of length 1.
        router_bias: Its scores have a bias.
        selection_bias: A bias for choosing only decides something: it differs between experts, not all are chosen.
        output_bias: The FFN's output has a bias of the plan's own.
        bits, group: Of a ``low_bit`` router: bits of a weight, weights that share a scale and an offset.
        int8: The FFN's weights are int8, and the high halves of gate and up are that router.
    """

    d_ff: int
    shared: int
    own: tuple[int, ...] = ()
    top_k: int = 0
    router: RouterKind = "linear"
    gate: GateKind = "uniform"
    rewritten: int = 0
    union: int | None = None
    varied: bool = False
    normalised: bool = False
    router_bias: bool = False
    selection_bias: bool = False
    output_bias: bool = False
    bits: int = 0
    group: int = 0
    int8: bool = False

    def __post_init__(self) -> None:
        if not self.own:
            object.__setattr__(self, "router", "static")

    @property
    def experts(self) -> int:
        """E."""
        return len(self.own)

    @property
    def width(self) -> int:
        """M, the widest expert."""
        return max(self.own, default=0)

    @property
    def neurons(self) -> int:
        """Rows of the packed FFN, the padding of shorter experts included; of a union at most."""
        return self.shared + (self.experts * self.width if self.union is None else self.union)

    @property
    def active(self) -> float:
        """Neurons that one token uses in the mean, padding not counted."""
        return self.shared + (self.top_k * sum(self.own) / len(self.own) if self.own else 0)

    @property
    def padding(self) -> int:
        """Neurons of zeros that bring all experts to one width."""
        return self.experts * self.width - sum(self.own)

    @property
    def all_on(self) -> bool:
        """Whether every expert is chosen always."""
        return self.top_k == self.experts

    @property
    def weighs_one(self) -> bool:
        """Whether a chosen expert always counts with weight 1."""
        return self.router == "static" or self.gate == "uniform" or (self.gate == "softmax_topk" and self.top_k == 1)

    @property
    def always_on(self) -> bool:
        """Whether every expert counts with weight 1 for every token, so that no score of the router matters."""
        return self.router == "static" or (self.all_on and self.weighs_one)

    def fitted(self) -> FFNShape:
        """With the router replaced by a linear one and weights of 1; single neurons keep theirs."""
        if self.router in ("static", "low_bit"):
            return self
        plain = {"normalised": False, "router_bias": False, "selection_bias": False}
        return replace(self, router="linear", gate="uniform", **plain)

    def router_rows(self, *, gated: bool) -> int:
        """Rows of width D that the router stores in fp32. ``gated``: the FFN has a gate path, so has a gated router."""
        per_expert = {"static": 0, "linear": 1, "low_rank": 1, "gated": 2 if gated else 1, "low_bit": 0}
        return per_expert[self.router] * self.experts

    def router_parameters(self, d_model: int, *, gated: bool) -> int:
        """Weights of the router, 0 where it is a copy (:data:`COPIES`); ``gated`` as above."""
        return 0 if self.router in COPIES else self.router_rows(gated=gated) * d_model

    def router_bytes(self, d_model: int, *, gated: bool) -> int:
        """Bytes of the router's tensors in the ``moesaic`` architecture; ``gated`` as above."""
        if self.router != "low_bit":
            return 4 * self.router_rows(gated=gated) * d_model
        steps = 1 if self.int8 else 2  # a scale per group, and an offset where weights are not int8, in bf16
        row = row_bytes(d_model, self.bits) + 2 * steps * row_groups(d_model, self.group)
        return self.experts * ((2 if gated else 1) * row + 4)  # and each neuron's norm in fp32

    def rest_bytes(self, d_model: int, *, gated: bool) -> int:
        """Bytes of int8 weights beside the router: low halves of gate and up, and the down projection with scales."""
        down = 2 * row_bytes(d_model, 4) + 2 * row_groups(d_model, self.group)
        return self.experts * ((2 if gated else 1) * row_bytes(d_model, 4) + down)


def layout_shape(layout: Layout, d_ff: int, router: RouterKind = "linear") -> FFNShape:
    """That of a layout. Raises InputError when an FFN of ``d_ff`` neurons has fewer than its units."""
    return FFNShape(d_ff, layout.shared_size(d_ff), tuple(layout.expert_sizes(d_ff)), layout.active, router)
