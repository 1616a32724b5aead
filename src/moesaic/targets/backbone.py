"""Everything of a dense decoder but its FFNs, in common terms: what a target must reproduce beside the experts. No
torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moesaic.anatomy.attention import head_dim
from moesaic.anatomy.base import MULTIPLIERS, Anatomy, Config, QKNorm
from moesaic.errors import UnsupportedModelError


@dataclass(frozen=True)
class Backbone:
    """Attention, norms, embeddings of a dense decoder.

    Attributes:
        config: The dense config with every default filled in.
        head_dim: Width of one attention head.
        qkv_bias, o_bias: Whether these projections have biases.
        qk_norm: Norm of queries and keys: none, per head, or over all heads at once.
        post_norm: Norms stand after attention and FFN (OLMo 2) in place of before.
        rope: Rotary parameters as transformers 5 writes them.
        partial_rotary: Share of each head that is rotated.
        window: Sliding attention window in tokens where it is smaller than the context, else None.
        window_everywhere: Whether all layers have it.
        multipliers: Granite's factors, all 1 (and 1/sqrt(head_dim)) in other families.
        ffn_bias: Whether the FFNs have biases.
        fused: Whether q, k, v are stored as one matrix (Phi-3).
        adjacent: Whether RoPE rotates neighbouring coordinates.
        tied: Whether the head is the embedding matrix.
    """

    config: Any
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: QKNorm
    post_norm: bool
    rope: dict[str, Any]
    partial_rotary: float
    window: int | None
    window_everywhere: bool
    multipliers: dict[str, float]
    ffn_bias: bool
    fused: bool
    adjacent: bool
    tied: bool

    @property
    def natural_head_dim(self) -> bool:
        """Whether the heads together are as wide as the model."""
        return self.head_dim * self.config.num_attention_heads == self.config.hidden_size

    @property
    def plain_multipliers(self) -> bool:
        """Whether the model computes as one without multipliers."""
        return self.multipliers == _plain(self.head_dim)


def no_backbone(anatomy: Anatomy) -> str | None:
    """Why no stock target has this family's backbone or FFN, or None."""
    family, model_type = anatomy.family, anatomy.family.model_type
    if family.moe is not None:
        return f"{model_type} is a MoE whose experts were split: stock architectures have no experts inside experts"
    if not anatomy.gated:
        return f"the FFNs of {model_type} have no gate path: experts of stock architectures are gated"
    if family.beyond_stock is not None:
        return f"no stock target has {family.beyond_stock} as {model_type} has"
    if family.attention is None:
        return f"no stock target is known to have the attention and norms of {model_type}"
    if anatomy.activation not in ("silu", "swish"):
        return f"activation {anatomy.activation}: engines compute the experts of stock architectures with SiLU"
    return None


def read_backbone(anatomy: Anatomy, *, as_written: bool = False) -> Backbone:
    """The backbone of a dense model for which :func:`no_backbone` is None.

    ``as_written``: by what config.json says, without the defaults of transformers, which takes seconds to import.

    Raises UnsupportedModelError for a config that transformers rejects.
    """
    family, attention = anatomy.family, anatomy.family.attention
    assert attention is not None
    config = _AsWritten(anatomy.config) if as_written else _with_defaults(anatomy)
    width = head_dim(anatomy)
    rope = {key: value for key, value in config.rope_parameters.items() if key != "partial_rotary_factor"}
    window, everywhere = _window(config)
    plain = _plain(width)
    return Backbone(
        config=config,
        head_dim=width,
        qkv_bias=_stated(attention.qkv_bias, config),
        o_bias=_stated(attention.o_bias, config),
        qk_norm=attention.qk_norm,
        post_norm=family.norms == "after",
        rope=rope,
        partial_rotary=float(config.rope_parameters.get("partial_rotary_factor") or 1.0),
        window=window,
        window_everywhere=everywhere,
        multipliers={key: _number(config, key, plain[key]) for key in plain} if family.multipliers else plain,
        ffn_bias=_stated(family.ffn_bias, config),
        fused=attention.fused,
        adjacent=attention.adjacent,
        tied=bool(config.tie_word_embeddings),
    )


def _number(config: Any, key: str, otherwise: float) -> float:
    value = getattr(config, key)
    return otherwise if value is None else float(value)


def _stated(fact: bool | str, config: Any) -> bool:
    """A fact of the family, or what the key of the config that it names says."""
    return bool(getattr(config, fact)) if isinstance(fact, str) else fact


def _plain(width: int) -> dict[str, float]:
    return dict.fromkeys(MULTIPLIERS, 1.0) | {"attention_multiplier": width**-0.5}


class _AsWritten:
    """config.json itself; a key that it leaves out is None."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __getattr__(self, key: str) -> Any:
        return self._config.get(key)

    @property
    def rope_parameters(self) -> dict[str, Any]:
        rope = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        return {"partial_rotary_factor": self._config.get("partial_rotary_factor"), **rope}

    @property
    def sliding_window(self) -> int | None:
        return None if self._config.get("use_sliding_window") is False else self._config.get("sliding_window")


def _with_defaults(anatomy: Anatomy) -> Any:
    from transformers import CONFIG_MAPPING

    model_type = anatomy.family.model_type
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(anatomy.config))
    except Exception as error:  # transformers validates strictly and with many exception types
        reason = " ".join(str(error).split())[:160]
        raise UnsupportedModelError(
            f"transformers cannot read this {model_type} config: {reason}", "is it complete?"
        ) from error


def _window(config: Any) -> tuple[int | None, bool]:
    """The window that narrows attention within the context, and whether it does in every layer."""
    window = getattr(config, "sliding_window", None)
    if not window or window >= (config.max_position_embeddings or math.inf):
        return None, False
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    sliding = [kind == "sliding_attention" for kind in types]
    return (window, all(sliding)) if any(sliding) else (None, False)
