"""Bamba: gated, Mamba in place of attention in most layers."""

from moesaic.anatomy.base import Family

FAMILY = Family(
    model_type="bamba",
    ffn="feed_forward",
    ffn_bias="mlp_bias",
    layers_return_tuples=True,
    beyond_stock="Mamba in place of attention in most layers",
)
