"""FlexOlmo's architecture, the MoE of OLMo 2: norms after attention and FFN, one norm over all query and all key heads.

No shared expert: shared neurons are copied into every expert, down projections of routed neurons are multiplied by K.
Weights of 1: rows scaled by eps; the router reads the residual stream itself, whose size is not known here, so eps is
relative to a deviation of 1.

Known limits: every layer has experts; the copies cost memory and, for K > 1, time; vLLM runs it through its
transformers backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moesaic.targets import common
from moesaic.targets.backbone import read_backbone
from moesaic.targets.base import Packed, Split, TargetOptions
from moesaic.targets.limits import Limits, approximates, reasons_against

LIMITS = Limits(qkv_bias=True, o_bias=True, qk_norm=("full",), post_norm=True)

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
    config = common.base_config(split, backbone, "flex_olmo", "FlexOlmoForCausalLM", provenance)
    return config | {
        "attention_bias": backbone.qkv_bias,
        "intermediate_size": geo.shared + geo.width,
        "num_experts": geo.experts,
        "num_experts_per_tok": geo.top_k,
        "norm_topk_prob": True,
    }


def layer_tensors(
    split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
) -> dict[str, Tensor]:
    """See :class:`TargetModule`."""
    moe = common.moe_layer(split, layer, copied, packed, options, normalised=True)
    experts = common.replicated(moe, common.geometry(split, options))
    return (
        common.kept_tensors(split, layer, copied)
        | common.expert_tensors(f"{moe.path}.experts", experts)
        | {f"{moe.path}.gate.weight": moe.router.weight_ED}
    )
