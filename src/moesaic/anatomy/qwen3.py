"""Qwen3: gated, SiLU, no biases in the FFN."""

from moesaic.anatomy.base import GATED_PROJ, Family

FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    layers="model.layers",
    ffn="mlp",
    names=GATED_PROJ,
)
