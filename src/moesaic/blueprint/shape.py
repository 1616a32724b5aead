"""How wide the parts of a split FFN become, known from the options alone. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesaic.blueprint.layout import Layout

RouterKind = Literal["static", "linear", "gated"]


@dataclass(frozen=True)
class Sizes:
    """The parts of one FFN.

    Attributes:
        shared: Neurons that every token uses.
        own: Neurons of each routed expert, before padding to a common width.
        top_k: Experts per token.
        router: The method's own; without experts there is none, whatever stands here.
        rewritten: Matrices of each neuron that are new numbers, which the blueprint then holds: 1 is a refitted down
            projection, 3 all of a gated FFN.
        union: Most neurons that all experts have together, where these are stored once; None: a copy for each.
        varied: Widths of a union's experts differ, and those of ``own`` hold in the mean over tokens.
        normalised: The router reads inputs of length 1.
        softmax: Chosen experts are weighed by the softmax over their scores, not by 1.
    """

    shared: int
    own: tuple[int, ...] = ()
    top_k: int = 0
    router: RouterKind = "linear"
    rewritten: int = 0
    union: int | None = None
    varied: bool = False
    normalised: bool = False
    softmax: bool = False

    @property
    def stored(self) -> int:
        """Neurons in memory, the padding of shorter experts included; of a union at most."""
        return self.shared + (len(self.own) * max(self.own, default=0) if self.union is None else self.union)

    @property
    def active(self) -> int:
        """Neurons that one token computes, that padding included."""
        return self.shared + self.top_k * max(self.own, default=0)


def layout_sizes(layout: Layout, d_ff: int, router: RouterKind = "linear") -> Sizes:
    """Those of a layout. Raises InputError when an FFN of ``d_ff`` neurons has fewer than its units."""
    return Sizes(layout.shared_size(d_ff), tuple(layout.expert_sizes(d_ff)), layout.active, router)
