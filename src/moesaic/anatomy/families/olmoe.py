"""OLMoE: already a MoE, every layer sparse, no shared expert."""

from moesaic.anatomy.base import GATED_PROJ, Family, MoENames

FAMILY = Family(
    model_type="olmoe",
    moe=MoENames(
        block="mlp",
        names=GATED_PROJ,
        expert_count="num_experts",
        expert_width="intermediate_size",
    ),
)
