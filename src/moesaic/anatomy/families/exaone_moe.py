"""K-EXAONE: as DeepSeek V3, with EXAONE 4's attention; a list or a number says which layers are dense."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import as_listed, experts_wide, from_layer

FAMILY = Family(
    model_type="exaone_moe",
    # On disk beside the router, in the model within it.
    renames=((".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),),
    moe=MoENames(
        "num_experts",
        "moe_intermediate_size",
        shared="mlp.shared_experts",
        shared_width=experts_wide("num_shared_experts", 1),
        sparse=as_listed(from_layer("first_k_dense_replace", 1)),
    ),
)
