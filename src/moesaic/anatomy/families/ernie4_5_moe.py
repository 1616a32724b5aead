"""ERNIE 4.5 (MoE): already a MoE, mostly with a shared expert; every n-th layer of a range has experts."""

from moesaic.anatomy.base import Config, Family, MoENames
from moesaic.anatomy.sparse import experts_wide


def _sparse(config: Config, layer: int) -> bool:
    start, end = config.get("moe_layer_start_index", 1), config.get("moe_layer_end_index", -1)
    in_range = start <= layer and (end == -1 or layer <= end)
    return in_range and (layer + 1) % config.get("moe_layer_interval", 1) == 0


FAMILY = Family(
    model_type="ernie4_5_moe",
    # On disk beside the router, in the model within it.
    renames=((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
    moe=MoENames(
        "moe_num_experts",
        "moe_intermediate_size",
        shared="mlp.shared_experts",
        shared_width=experts_wide("moe_num_shared_experts", 2),
        sparse=_sparse,
    ),
)
