"""Hunyuan V3: a shared expert, sigmoid routing with a bias on the choice; the first layers are dense."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import as_listed, experts_wide

FAMILY = Family(
    model_type="hy_v3",
    renames=(
        (".mlp.router.gate.", ".mlp.gate."),
        (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
        (".mlp.shared_mlp.", ".mlp.shared_experts."),
    ),
    moe=MoENames(
        "num_experts",
        "moe_intermediate_size",
        shared="mlp.shared_experts",
        shared_width=experts_wide("num_shared_experts", 1),
        sparse=as_listed(lambda _, layer: layer > 0),
    ),
)
