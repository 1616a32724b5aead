"""Mixtral's architecture: softmax over the chosen scores, no shared expert, a sliding window in every layer if any.

Down projections of routed experts are multiplied by K; shared neurons are copied into every expert. Weights of 1: rows
scaled by eps.

Known limits: every layer has experts; the copies cost memory and, for K > 1, time; rounded in bf16 unless K is a power
of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moesaic.targets import common
from moesaic.targets.backbone import read_backbone
from moesaic.targets.base import Packed, Split, TargetOptions
from moesaic.targets.limits import Limits, approximates, reasons_against

LIMITS = Limits(window=True)

rest_tensors = common.untied_rest
files = common.no_files
factor = common.times_top_k


def reasons(split: Split) -> list[str]:
    """See :class:`TargetModule`."""
    return reasons_against(split, LIMITS)


def exact(split: Split, options: TargetOptions) -> bool:
    """See :class:`TargetModule`."""
    return not approximates(split, normalised=True)


def config_json(split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
    """See :class:`TargetModule`."""
    backbone = read_backbone(split.anatomy)
    geo = common.geometry(split, options)
    config = common.base_config(split, backbone, "mixtral", "MixtralForCausalLM", provenance)
    return config | {
        "intermediate_size": geo.shared + geo.width,
        "num_local_experts": geo.experts,
        "num_experts_per_tok": geo.top_k,
        "sliding_window": backbone.window,
    }


def layer_tensors(
    split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
) -> dict[str, Tensor]:
    """See :class:`TargetModule`."""
    moe = common.moe_layer(split, layer, copied, packed, options, normalised=True)
    path = f"{split.anatomy.layer_path(layer)}.block_sparse_moe"
    experts = common.replicated(moe, common.geometry(split, options))
    return (
        common.kept_tensors(split, layer, copied)
        | common.expert_tensors(f"{path}.experts", experts, ("w1", "w3", "w2"))
        | {f"{path}.gate.weight": moe.router.weight_ED}
    )
