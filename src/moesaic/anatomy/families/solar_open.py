"""Solar Open: as GLM-4.5, every layer sparse."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import experts_wide

FAMILY = Family(
    model_type="solar_open",
    moe=MoENames(
        "n_routed_experts",
        "moe_intermediate_size",
        shared="mlp.shared_experts",
        shared_width=experts_wide("n_shared_experts", 1),
    ),
)
