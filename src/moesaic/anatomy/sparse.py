"""Which layers of a MoE have experts, and how wide a shared expert is, where config.json says it in numbers."""

from __future__ import annotations

from collections.abc import Callable

from moesaic.anatomy.base import Config, require

Sparse = Callable[[Config, int], bool]
"""config.json and the index of a decoder layer -> whether that layer has experts."""


def from_layer(key: str, otherwise: int) -> Sparse:
    """The first layers are dense, as many as ``key`` says; ``otherwise`` is transformers' default."""

    def sparse(config: Config, layer: int) -> bool:
        dense = config.get(key)
        return layer >= (otherwise if dense is None else dense)

    return sparse


def as_listed(unlisted: Sparse) -> Sparse:
    """As ``mlp_layer_types`` says, one word per layer; ``unlisted`` decides where config.json has no such list."""

    def sparse(config: Config, layer: int) -> bool:
        listed = config.get("mlp_layer_types")
        return listed[layer] == "sparse" if listed else unlisted(config, layer)

    return sparse


def every_step(config: Config, layer: int) -> bool:
    """Qwen's rule: every ``decoder_sparse_step``-th layer, but for those in ``mlp_only_layers``."""
    step = config.get("decoder_sparse_step") or 1
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def experts_wide(key: str, otherwise: int = 0) -> Callable[[Config], int]:
    """A shared expert as wide as so many routed ones as ``key`` says; ``otherwise`` is transformers' default."""

    def width(config: Config) -> int:
        count = config.get(key)
        return (otherwise if count is None else count) * require(config, "moe_intermediate_size", config["model_type"])

    return width
