"""Mistral: gated, SiLU, no biases."""

from moesaic.anatomy.base import GATED_PROJ, Family

FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    layers="model.layers",
    ffn="mlp",
    names=GATED_PROJ,
)
