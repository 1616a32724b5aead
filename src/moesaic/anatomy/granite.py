"""Granite 3 (dense): Llama's layout with multipliers on embeddings, residuals, attention and logits; biases only with
``mlp_bias``."""

from moesaic.anatomy.base import GATED_PROJ, Family

FAMILY = Family(
    name="granite",
    model_types=("granite",),
    layers="model.layers",
    ffn="mlp",
    names=GATED_PROJ,
)
