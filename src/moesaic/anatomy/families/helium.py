"""Helium 1: Llama's layout; RoPE rotates neighbouring coordinates."""

from moesaic.anatomy.base import Family

FAMILY = Family(model_type="helium", ffn_bias="mlp_bias")
