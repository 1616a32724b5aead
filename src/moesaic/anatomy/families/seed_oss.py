"""Seed-OSS: Llama's layout, with a key of its own for the bias of the attention's output."""

from moesaic.anatomy.base import Attention, Family

FAMILY = Family(
    model_type="seed_oss",
    attention=Attention(qkv_bias="attention_bias", o_bias="attention_out_bias", head_dim=128),
    ffn_bias="mlp_bias",
)
