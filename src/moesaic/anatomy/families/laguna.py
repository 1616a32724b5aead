"""Laguna: a shared expert; the first layer is dense, or a list says which are. Layers differ in their heads."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import as_listed

FAMILY = Family(
    model_type="laguna",
    renames=(
        (".mlp.experts.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
        (".mlp.shared_expert.", ".mlp.shared_experts."),
    ),
    moe=MoENames(
        "num_experts",
        "moe_intermediate_size",
        shared="mlp.shared_experts",
        shared_width="shared_expert_intermediate_size",
        sparse=as_listed(lambda _, layer: layer > 0),
    ),
)
