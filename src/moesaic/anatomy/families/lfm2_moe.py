"""LFM2-MoE: LFM2's layers; experts in all but the first, no shared expert."""

from moesaic.anatomy.base import Family, FFNNames, MoENames
from moesaic.anatomy.sparse import from_layer

_NAMES = FFNNames(gate="w1", up="w3", down="w2")

FAMILY = Family(
    model_type="lfm2_moe",
    ffn="feed_forward",
    activation=None,
    activation_of=lambda _: "silu",
    moe=MoENames(
        "num_experts",
        "moe_intermediate_size",
        block="feed_forward",
        names=_NAMES,
        dense_names=_NAMES,
        sparse=from_layer("num_dense_layers", 2),
    ),
)
