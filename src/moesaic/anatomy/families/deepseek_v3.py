"""DeepSeek V3 and R1, Moonlight, Kimi K2: as V2, with sigmoid routing and a bias on the choice."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import experts_wide, from_layer

FAMILY = Family(
    model_type="deepseek_v3",
    moe=MoENames(
        "n_routed_experts",
        "moe_intermediate_size",
        shared="mlp.shared_experts",
        shared_width=experts_wide("n_shared_experts", 1),
        sparse=from_layer("first_k_dense_replace", 3),
    ),
)
