"""Gemma 3 (text model): as Gemma 2, with norms on each head's queries and keys in place of soft caps."""

from dataclasses import replace

from moesaic.anatomy.base import Attention
from moesaic.anatomy.families import gemma2

FAMILY = replace(
    gemma2.FAMILY,
    model_type="gemma3_text",
    attention=Attention(qk_norm="head", head_dim=256, qkv_bias="attention_bias", o_bias="attention_bias"),
    beyond_stock="GELU experts, norms on both sides of the FFN, and two RoPE bases",
)
