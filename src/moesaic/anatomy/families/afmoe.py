"""Trinity (AFMoE): a shared expert, norms on both sides of the FFN; the first layers are dense."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import experts_wide, from_layer

FAMILY = Family(
    model_type="afmoe",
    norms="both",
    moe=MoENames(
        "num_experts",
        "moe_intermediate_size",
        shared="mlp.shared_experts",
        shared_width=experts_wide("num_shared_experts", 2),
        sparse=from_layer("num_dense_layers", 1),
    ),
)
