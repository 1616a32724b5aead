"""Qwen1.5-MoE and Qwen2-MoE: already a MoE, with a shared expert; some layers may be dense."""

from moesaic.anatomy.base import GATED_PROJ, Family, MoENames

FAMILY = Family(
    model_type="qwen2_moe",
    moe=MoENames(
        block="mlp",
        names=GATED_PROJ,
        expert_count="num_experts",
        expert_width="moe_intermediate_size",
        shared="shared_expert",
        shared_names=GATED_PROJ,
        shared_width="shared_expert_intermediate_size",
        dense_names=GATED_PROJ,
    ),
)
