"""How wide the parts of a split FFN become, for methods whose options are no SxAyEz layout. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Neurons of the parts: ``shared`` for every token, ``own`` per routed expert, ``top_k`` of them per token."""

    shared: int
    own: tuple[int, ...]
    top_k: int

    @property
    def stored(self) -> int:
        """Neurons in memory, the padding of shorter experts included."""
        return self.shared + len(self.own) * max(self.own, default=0)

    @property
    def active(self) -> int:
        """Neurons that one token computes, that padding included."""
        return self.shared + self.top_k * max(self.own, default=0)
