"""Qwen3-MoE: already a MoE, no shared expert; some layers may be dense."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import every_step

FAMILY = Family(model_type="qwen3_moe", moe=MoENames("num_experts", "moe_intermediate_size", sparse=every_step))
