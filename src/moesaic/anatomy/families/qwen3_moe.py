"""Qwen3-MoE: already a MoE, no shared expert; some layers may be dense."""

from moesaic.anatomy.base import GATED_PROJ, Family, MoENames

FAMILY = Family(
    model_type="qwen3_moe",
    moe=MoENames(
        block="mlp",
        names=GATED_PROJ,
        expert_count="num_experts",
        expert_width="moe_intermediate_size",
        dense_names=GATED_PROJ,
    ),
)
