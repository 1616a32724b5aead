"""ERNIE 4.5 (dense): Llama's layout, one key for all biases; RoPE rotates neighbouring coordinates."""

from moesaic.anatomy.base import Family

FAMILY = Family(model_type="ernie4_5", ffn_bias="use_bias")
