"""Granite 3 (MoE) with a shared expert beside the block of the others."""

from dataclasses import replace

from moesaic.anatomy.base import FFNNames
from moesaic.anatomy.families import granitemoe

assert granitemoe.FAMILY.moe is not None

FAMILY = replace(
    granitemoe.FAMILY,
    model_type="granitemoeshared",
    moe=replace(
        granitemoe.FAMILY.moe,
        shared="shared_mlp",
        shared_names=FFNNames(up="input_linear", down="output_linear", fused=True),
        shared_width="shared_intermediate_size",
    ),
)
