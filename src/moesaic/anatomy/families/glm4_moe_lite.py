"""GLM-4.7-Flash: as GLM-4.5, with latent attention; a list says which layers are dense."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import as_listed, experts_wide

FAMILY = Family(
    model_type="glm4_moe_lite",
    moe=MoENames(
        "n_routed_experts",
        "moe_intermediate_size",
        shared="mlp.shared_experts",
        shared_width=experts_wide("n_shared_experts", 1),
        sparse=as_listed(lambda _, layer: layer > 0),
    ),
)
