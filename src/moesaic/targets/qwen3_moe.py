"""Qwen3-MoE's architecture: norms on queries and keys, softmax over the chosen scores, no shared expert, dense layers
anywhere.

Down projections of routed experts are multiplied by K; shared neurons are copied into every expert. Weights of 1: rows
scaled by eps.

Known limits: the copies cost memory and, for K > 1, time; rounded in bf16 unless K is a power of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesaic.targets.backbone import read_backbone
from moesaic.targets.base import Packed, Split, Target, TargetOptions, VLLMGaps
from moesaic.targets.config import base_config, geometry
from moesaic.targets.limits import Limits

if TYPE_CHECKING:
    from torch import Tensor


class Qwen3MoE(Target):
    """See the file's own text."""

    def config_json(self, split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
        """See :class:`Target`."""
        backbone = read_backbone(split.anatomy)
        geo = geometry(split, options)
        config = base_config(split, backbone, "qwen3_moe", "Qwen3MoeForCausalLM", provenance)
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
        self, split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
    ) -> dict[str, Tensor]:
        """See :class:`Target`."""
        from moesaic.targets import tensors

        geo = geometry(split, options)
        kept = tensors.kept_tensors(split, layer, copied)
        if layer in geo.dense:
            return kept | tensors.dense_ffn(split, layer, copied, packed, geo.dense_width)
        moe = tensors.moe_layer(split, layer, copied, packed, options, normalised=True)
        experts = tensors.expert_tensors(f"{moe.path}.experts", tensors.replicated(moe, geo))
        return kept | experts | {f"{moe.path}.gate.weight": moe.router.weight_ED}


TARGET = Qwen3MoE(
    name="qwen3_moe",
    summary="no shared expert, norms on queries and keys, dense layers anywhere",
    engines=("transformers", "vLLM", "SGLang", "llama.cpp's converter"),
    limits=Limits(qkv_bias=True, o_bias=True, qk_norm=("head",), window=True, dense_layers="any", shared_expert=False),
    times="top_k",
    vllm=VLLMGaps(unread_biases=("o_proj",)),
)
