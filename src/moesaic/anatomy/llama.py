"""Llama 1 to 3, SmolLM2, TinyLlama and other models of this layout: gated, SiLU, biases only with ``mlp_bias``."""

from moesaic.anatomy.base import GATED_PROJ, Family

FAMILY = Family(
    name="llama",
    model_types=("llama",),
    layers="model.layers",
    ffn="mlp",
    names=GATED_PROJ,
)
