"""SmolLM3: gated, SiLU, biases only with ``mlp_bias``."""

from moesaic.anatomy.base import GATED_PROJ, Family

FAMILY = Family(
    name="smollm3",
    model_types=("smollm3",),
    layers="model.layers",
    ffn="mlp",
    names=GATED_PROJ,
)
