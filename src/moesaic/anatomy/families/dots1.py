"""dots.llm1: as DeepSeek V3, with ordinary attention."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import experts_wide, from_layer

FAMILY = Family(
    model_type="dots1",
    moe=MoENames(
        "n_routed_experts",
        "moe_intermediate_size",
        shared="mlp.shared_experts",
        shared_width=experts_wide("n_shared_experts"),
        sparse=from_layer("first_k_dense_replace", 0),
    ),
)
