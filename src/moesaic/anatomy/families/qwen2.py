"""Qwen2 and Qwen2.5: gated, SiLU; query, key and value always have biases."""

from moesaic.anatomy.base import Attention, Family

FAMILY = Family(
    model_type="qwen2",
    attention=Attention(qkv_bias=True),
)
