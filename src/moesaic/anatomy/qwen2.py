"""Qwen2 and Qwen2.5: gated, SiLU; the biases of q, k and v are no concern of the FFN."""

from moesaic.anatomy.base import GATED_PROJ, Family

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    layers="model.layers",
    ffn="mlp",
    names=GATED_PROJ,
)
