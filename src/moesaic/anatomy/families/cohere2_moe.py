"""Command A (MoE): Cohere 2's parallel layers; shared experts may be averaged with the routed ones."""

from moesaic.anatomy.base import Config, Family, MoENames
from moesaic.anatomy.sparse import as_listed, from_layer


def _shared_width(config: Config) -> int:
    return config["intermediate_size"] * config.get("num_shared_experts", 0)


FAMILY = Family(
    model_type="cohere2_moe",
    moe=MoENames(
        "num_experts",
        "intermediate_size",
        shared="mlp.shared_experts",
        shared_width=_shared_width,
        sparse=as_listed(from_layer("first_k_dense_replace", 0)),
        dense_width="prefix_dense_intermediate_size",
    ),
)
