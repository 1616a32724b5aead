"""GLM-4.5's architecture, the universal target: ungated shared expert, sigmoid router in fp32, leading dense layers.

Weights of 1: rows scaled by eps, ``norm_topk_prob`` false and ``routed_scaling_factor`` 2, so w = 2 sigmoid(eps z) = 1 + eps z / 2.
With top-1 in all layers the weight is normalised and exactly 1. A router bias b becomes ``e_score_correction_bias`` eps b / 4:
sigmoid(eps z) + eps b / 4 ranks like z + b up to terms of eps^2. Layers may differ: missing experts are dead (bias -10), missing active
ones are experts of zeros that are always chosen (bias +10).

Known limits: engines overlook tied embeddings, so the head is written; transformers wants two experts at least; the shared expert's width
is a multiple of an expert's, and a model without one gets one of zeros.

Axes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.targets import common
from moesaic.targets.backbone import read_backbone
from moesaic.targets.base import Packed, Split, TargetOptions
from moesaic.targets.common import Geometry
from moesaic.targets.limits import Limits, reasons_against

LIMITS = Limits(
    qkv_bias=True,
    qk_norm=("none", "head"),
    partial_rotary=True,
    dense_layers="leading",
    unequal_layers=True,
    softmax_topk=False,
    router_bias=True,
)
_PINNED, _DEAD = 10.0, -10.0

rest_tensors = common.untied_rest
files = common.no_files


def reasons(split: Split) -> list[str]:
    """See :class:`TargetModule`."""
    return reasons_against(split, LIMITS)


def config_json(split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
    """See :class:`TargetModule`."""
    backbone = read_backbone(split.anatomy)
    geo = common.geometry(split, options)
    config = common.base_config(split, backbone, "glm4_moe", "Glm4MoeForCausalLM", provenance)
    top1 = geo.top_k == 1
    return config | {
        "rope_parameters": {**backbone.rope, "partial_rotary_factor": backbone.partial_rotary},
        "partial_rotary_factor": backbone.partial_rotary,
        "attention_bias": backbone.qkv_bias,
        "use_qk_norm": backbone.qk_norm == "head",
        "intermediate_size": geo.dense_width,
        "moe_intermediate_size": geo.width,
        "n_routed_experts": _slots(split, geo),
        "n_shared_experts": _shared_multiple(geo),
        "num_experts_per_tok": geo.top_k,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": len(geo.dense),
        "norm_topk_prob": top1,
        "routed_scaling_factor": 1.0 if top1 else 2.0,
        "num_nextn_predict_layers": 0,
    }


def layer_tensors(
    split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
) -> dict[str, Tensor]:
    """See :class:`TargetModule`."""
    geo = common.geometry(split, options)
    kept = common.kept_tensors(split, layer, copied)
    if layer in geo.dense:
        return kept | common.dense_ffn(split, layer, copied, packed, geo.dense_width)
    moe = common.moe_layer(split, layer, copied, packed, options, normalised=geo.top_k == 1)
    pinned = geo.top_k - moe.plan.top_k
    dead = _slots(split, geo) - len(moe.experts) - pinned
    spare = [moe.experts[0].zeros(geo.width)] * (pinned + dead)
    bias_E = torch.cat([moe.router.bias_E / 4, torch.full((pinned,), _PINNED), torch.full((dead,), _DEAD)])
    return (
        kept
        | common.expert_tensors(f"{moe.path}.experts", [expert.padded(geo.width) for expert in moe.experts] + spare)
        | moe.shared.padded(_shared_multiple(geo) * geo.width).tensors(f"{moe.path}.shared_experts")
        | {
            f"{moe.path}.gate.weight": F.pad(moe.router.weight_ED, (0, 0, 0, pinned + dead)),
            f"{moe.path}.gate.e_score_correction_bias": bias_E,
        }
    )


def _slots(split: Split, geo: Geometry) -> int:
    """Experts of every layer: room for each layer's own and for the always chosen ones that fill up its top-k."""
    return max(2, *(len(plan.experts) + geo.top_k - plan.top_k for plan in split.plans.values() if plan.experts))


def _shared_multiple(geo: Geometry) -> int:
    """Width of the shared expert in experts; it cannot be absent."""
    return max(1, common.aligned(geo.shared, geo.width) // geo.width)
