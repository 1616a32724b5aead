"""Llama 1 to 3, SmolLM2, TinyLlama and other models of this layout: gated, SiLU, biases only where the config says."""

from moesaic.anatomy.base import Attention, Family

FAMILY = Family(
    model_type="llama",
    attention=Attention(qkv_bias="attention_bias", o_bias="attention_bias"),
    ffn_bias="mlp_bias",
)
