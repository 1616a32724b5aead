"""Which attention blocks are masked, and where their projections are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.anatomy.attention import attention_path, attention_support, head_dim, heads
from moesaic.anatomy.base import Anatomy
from moesaic.errors import UnsupportedModelError


@dataclass(frozen=True)
class AttentionSite:
    """One attention block with separate q_proj, k_proj, v_proj and o_proj.

    Attributes:
        path: Module path, ``model.layers.3.self_attn``.
        heads, key_heads: Query heads; key and value heads.
        head_dim: H.
        pairs: Rotary pairs that may be pruned: H / 2, or 0 (see :func:`pair_refusal`).
    """

    path: str
    heads: int
    key_heads: int
    head_dim: int
    pairs: int


def pair_refusal(anatomy: Anatomy) -> str | None:
    """Why queries and keys of this model cannot be pruned; None where they can."""
    return attention_support(anatomy).pairs


def attention_sites(anatomy: Anatomy, layers: Sequence[int], wanted: str) -> list[AttentionSite]:
    """The attention blocks of ``layers``, none when ``wanted`` (the config's ``attention``) is "none".

    Raises UnsupportedModelError when the model's attention can be masked in none of the wanted ways.
    """
    if wanted == "none":
        return []
    support = attention_support(anatomy)
    reason = support.pairs if wanted == "pairs" else support.values
    if reason is not None:
        raise UnsupportedModelError(reason, "leave attention alone: attention: none")
    return [block(anatomy, layer) for layer in layers]


def block(anatomy: Anatomy, layer: int) -> AttentionSite:
    """The sizes of one attention block, whether or not it can be masked."""
    count, width = heads(anatomy), head_dim(anatomy)
    return AttentionSite(
        path=attention_path(anatomy, layer),
        heads=count,
        key_heads=int(anatomy.config.get("num_key_value_heads") or count),
        head_dim=width,
        pairs=0 if pair_refusal(anatomy) else width // 2,
    )
