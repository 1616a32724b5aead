"""GLM-4.5 and 4.6: as DeepSeek V3, with ordinary attention."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import experts_wide, from_layer

FAMILY = Family(
    model_type="glm4_moe",
    moe=MoENames(
        "n_routed_experts",
        "moe_intermediate_size",
        shared="mlp.shared_experts",
        shared_width=experts_wide("n_shared_experts", 1),
        sparse=from_layer("first_k_dense_replace", 1),
    ),
)
