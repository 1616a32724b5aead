"""OLMoE: already a MoE, every layer sparse, no shared expert."""

from moesaic.anatomy.base import Family, MoENames

FAMILY = Family(model_type="olmoe", moe=MoENames("num_experts", "intermediate_size"))
