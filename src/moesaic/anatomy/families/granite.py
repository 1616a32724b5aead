"""Granite 3 (dense): Llama's layout with multipliers on embeddings, residuals, attention and logits."""

from moesaic.anatomy.base import Attention, Family

FAMILY = Family(
    model_type="granite",
    attention=Attention(qkv_bias="attention_bias", o_bias="attention_bias"),
    ffn_bias="mlp_bias",
    multipliers=True,
)
