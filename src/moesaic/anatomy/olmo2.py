"""OLMo 2: gated, SiLU, norms after the FFN."""

from moesaic.anatomy.base import GATED_PROJ, Family

FAMILY = Family(
    name="olmo2",
    model_types=("olmo2",),
    layers="model.layers",
    ffn="mlp",
    names=GATED_PROJ,
    norm_after=("olmo2",),
)
