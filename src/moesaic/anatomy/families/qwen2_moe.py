"""Qwen1.5-MoE and Qwen2-MoE: already a MoE, with a shared expert; some layers may be dense."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import every_step

FAMILY = Family(
    model_type="qwen2_moe",
    moe=MoENames(
        "num_experts",
        "moe_intermediate_size",
        shared="mlp.shared_expert",
        shared_width="shared_expert_intermediate_size",
        sparse=every_step,
    ),
)
