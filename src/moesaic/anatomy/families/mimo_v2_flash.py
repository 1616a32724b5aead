"""MiMo-V2-Flash: GLM-4.5's routing without a shared expert; the first layer is dense."""

from moesaic.anatomy.base import Family, MoENames
from moesaic.anatomy.sparse import as_listed

FAMILY = Family(
    model_type="mimo_v2_flash",
    # On disk as the paper calls it.
    renames=((".self_attn.attention_sink_bias", ".self_attn.sinks"),),
    moe=MoENames("n_routed_experts", "moe_intermediate_size", sparse=as_listed(lambda _, layer: layer > 0)),
)
