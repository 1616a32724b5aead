"""Granite with sliding windows (MoE): Granite's experts, stacked on disk under the model's own names."""

from dataclasses import replace

from moesaic.anatomy.base import FFNNames
from moesaic.anatomy.families import granitemoeshared

assert granitemoeshared.FAMILY.moe is not None

_STACKED = FFNNames(
    up="experts.gate_up_proj", down="experts.down_proj", fused=True, stacked=True, suffixes=("", "_bias")
)

FAMILY = replace(
    granitemoeshared.FAMILY,
    model_type="granitemoe_swa",
    renames=(),
    moe=replace(granitemoeshared.FAMILY.moe, names=_STACKED),
)
