"""DeepSeek V2 and V2-Lite: already a MoE, with a shared expert; the first layers are dense. Latent attention."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import experts_wide, from_layer

FAMILY = Family(
    model_type="deepseek_v2",
    moe=MoENames(
        "n_routed_experts",
        "moe_intermediate_size",
        shared="mlp.shared_experts",
        shared_width=experts_wide("n_shared_experts", 2),
        sparse=from_layer("first_k_dense_replace", 0),
    ),
)
