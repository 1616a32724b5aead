"""Qwen3: gated, SiLU, no biases in the FFN, norms on each head's queries and keys."""

from moesaic.anatomy.base import Attention, Family

FAMILY = Family(
    model_type="qwen3",
    attention=Attention(qk_norm="head", head_dim=128, qkv_bias="attention_bias", o_bias="attention_bias"),
)
