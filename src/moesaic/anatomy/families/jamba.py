"""Jamba: Mamba in most layers, attention in the others; every second layer has experts."""

from moesaic.anatomy.base import Config, Family, MoENames


def _sparse(config: Config, layer: int) -> bool:
    period, offset = config.get("expert_layer_period", 2), config.get("expert_layer_offset", 1)
    return layer % period == offset and config.get("num_experts", 16) > 1


FAMILY = Family(
    model_type="jamba",
    ffn="feed_forward",
    moe=MoENames("num_experts", "intermediate_size", block="feed_forward", sparse=_sparse),
)
