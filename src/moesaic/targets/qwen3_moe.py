"""Qwen3-MoE's architecture: norms on queries and keys, softmax over the chosen scores, no shared expert, dense layers
anywhere.

Down projections of routed experts are multiplied by K; shared neurons are copied into every expert. Weights of 1: rows
scaled by eps.

Known limits: the copies cost memory and, for K > 1, time; rounded in bf16 unless K is a power of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moesaic.targets import common
from moesaic.targets.backbone import read_backbone
from moesaic.targets.base import Packed, Split, TargetOptions
from moesaic.targets.limits import Limits, approximates, reasons_against

LIMITS = Limits(qkv_bias=True, o_bias=True, qk_norm=("head",), window=True, dense_layers="any")

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
    config = common.base_config(split, backbone, "qwen3_moe", "Qwen3MoeForCausalLM", provenance)
    return config | {
        "attention_bias": backbone.qkv_bias,
        "intermediate_size": geo.dense_width,
        "moe_intermediate_size": geo.shared + geo.width,
        "num_experts": geo.experts,
        "num_experts_per_tok": geo.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(geo.dense),
        "use_sliding_window": backbone.window is not None,
        "sliding_window": backbone.window,
    }


def layer_tensors(
    split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
) -> dict[str, Tensor]:
    """See :class:`TargetModule`."""
    geo = common.geometry(split, options)
    kept = common.kept_tensors(split, layer, copied)
    if layer in geo.dense:
        return kept | common.dense_ffn(split, layer, copied, packed, geo.dense_width)
    moe = common.moe_layer(split, layer, copied, packed, options, normalised=True)
    experts = common.expert_tensors(f"{moe.path}.experts", common.replicated(moe, geo))
    return kept | experts | {f"{moe.path}.gate.weight": moe.router.weight_ED}
