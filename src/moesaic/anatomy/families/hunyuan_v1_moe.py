"""Hunyuan V1 (MoE): already a MoE, every layer sparse, with a shared expert as wide as the others."""

from moesaic.anatomy.base import Family, MoENames

FAMILY = Family(
    model_type="hunyuan_v1_moe",
    moe=MoENames("num_experts", "intermediate_size", shared="mlp.shared_mlp", shared_width="intermediate_size"),
)
