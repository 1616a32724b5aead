"""ERNIE 4.5 (dense): Llama's layout, one key for all biases; RoPE rotates neighbouring coordinates."""

from moesaic.anatomy.base import Attention, Family

FAMILY = Family(
    model_type="ernie4_5",
    attention=Attention(qkv_bias="use_bias", o_bias="use_bias", head_dim=128, adjacent=True),
    ffn_bias="use_bias",
)
