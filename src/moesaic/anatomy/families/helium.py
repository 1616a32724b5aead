"""Helium 1: Llama's layout; RoPE rotates neighbouring coordinates."""

from moesaic.anatomy.base import Attention, Family

FAMILY = Family(
    model_type="helium",
    attention=Attention(qkv_bias="attention_bias", head_dim=128, adjacent=True),
    ffn_bias="mlp_bias",
)
