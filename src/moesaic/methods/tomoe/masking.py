"""Masks on a stock transformers model, by hooks alone: no module is replaced, no weight is touched.

FFN: the block's input chooses the mask, the input of the down projection is multiplied by it, once. Attention: the
outputs of the q and k projections (a dim and its rotary partner together), of the v projection, and the input of the
output projection, the latter two by the same mask.

Axes: D model width, F neurons, H dims of an attention head; "..." batch and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from moesaic.anatomy.base import FFNSite
from moesaic.methods.tomoe.attention import AttentionSite


class Gates(Protocol):
    """Decides masks while the model runs. ``place`` counts the masked layers from 0."""

    def neurons(self, place: int, x: Tensor) -> Tensor:
        """Factor on the neurons, [..., F], given the FFN's input [..., D]."""
        ...

    def pairs(self, place: int, x: Tensor) -> Tensor | None:
        """Factor on the query and key dims, [H] or [..., H]; None leaves them alone."""
        ...

    def values(self, place: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Factors on the value dims and on each head's output, [..., H]; None leaves them alone."""
        ...


class Masker:
    """Hooks on the FFNs and attention blocks of a model; they do nothing unless :meth:`on` is entered.

    Args:
        model: A causal language model of transformers.
        ffns: FFNs to mask.
        attention: Attention blocks to mask, one per FFN, or none.
    """

    def __init__(self, model: nn.Module, ffns: Sequence[FFNSite], attention: Sequence[AttentionSite] = ()) -> None:
        self._gates: Gates | None = None
        self._waiting: dict[tuple[str, int], Tensor | None] = {}
        self._handles: list[Any] = []
        for place, site in enumerate(ffns):
            down = model.get_submodule(site.tensor_names()["down"])
            self._handles += [
                model.get_submodule(site.path).register_forward_pre_hook(self._enter_ffn(place)),
                down.register_forward_pre_hook(self._mask_input("ffn", place, 1)),
            ]
        for place, site in enumerate(attention):
            q, k, v, o = (model.get_submodule(f"{site.path}.{name}_proj") for name in "qkvo")
            self._handles += [
                q.register_forward_hook(self._mask_pairs(place, site.heads)),
                k.register_forward_hook(self._mask_pairs(place, site.key_heads)),
                v.register_forward_hook(self._mask_values(place, site.key_heads)),
                o.register_forward_pre_hook(self._mask_input("values", place, site.heads)),
            ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def on(self, gates: Gates) -> Iterator[None]:
        """Masks act inside this context."""
        self._gates = gates
        try:
            yield
        finally:
            self._gates = None
            self._waiting.clear()

    def _enter_ffn(self, place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._gates is not None:
                self._waiting["ffn", place] = self._gates.neurons(place, args[0])

        return hook

    def _mask_input(self, kind: str, place: int, heads: int) -> Callable[..., tuple[Tensor, ...] | None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            factor = self._waiting.pop((kind, place), None)
            return None if factor is None else (by_head(args[0], factor, heads), *args[1:])

        return hook

    def _mask_pairs(self, place: int, heads: int) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            factor = None if self._gates is None else self._gates.pairs(place, args[0])
            return None if factor is None else by_head(output, factor, heads)

        return hook

    def _mask_values(self, place: int, heads: int) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._gates is None:
                return None
            factor, self._waiting["values", place] = self._gates.values(place, args[0])
            return None if factor is None else by_head(output, factor, heads)

        return hook


def by_head(x: Tensor, factor: Tensor, heads: int) -> Tensor:
    """x [..., heads * H] times factor [H] or [..., H] for every head, in the dtype of x."""
    factor = factor.to(x.dtype)
    return x * factor if heads == 1 else (x.unflatten(-1, (heads, -1)) * factor.unsqueeze(-2)).flatten(-2)
