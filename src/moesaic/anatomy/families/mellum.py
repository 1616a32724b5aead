"""Mellum 2: Qwen3-MoE's experts; a list says which layers are dense."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import as_listed

FAMILY = Family(
    model_type="mellum",
    moe=MoENames("num_experts", "moe_intermediate_size", sparse=as_listed(lambda *_: True)),
)
