"""Qwen1.5-MoE's architecture: a shared expert behind a sigmoid gate, softmax over all scores, dense layers anywhere.

Written so that every engine computes the same: ``norm_topk_prob`` false, as llama.cpp has no other, and down
projections of routed experts times N, w = N softmax(eps z), near 1; the shared gate a little beside zero (llama.cpp
computes silu(g) / g for it, NaN at g = 0) and the shared down projection times 2; biases of query, key and value
always, as vLLM reads them unasked.

Known limits: weights of 1 only; rounded in bf16 unless N is a power of two.

Axes: D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesaic.blueprint.shape import FFNShape
from moesaic.targets.backbone import read_backbone
from moesaic.targets.base import Packed, Split, Target, TargetOptions, VLLMGaps
from moesaic.targets.config import base_config, geometry
from moesaic.targets.limits import Limits

if TYPE_CHECKING:
    from torch import Tensor

_GATE = 1e-7
"""Deviation of the shared gate's weights: small enough for sigmoid = 1/2, never zero."""


class Qwen2MoE(Target):
    """See the file's own text."""

    def stored(self, shape: FFNShape, split: Split, options: TargetOptions) -> tuple[int, int]:
        """See :class:`Target`."""
        geo = geometry(split, options)
        return geo.experts * geo.width + (geo.shared or options.align), geo.experts + 1

    def config_json(self, split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
        """See :class:`Target`."""
        backbone = read_backbone(split.anatomy)
        geo = geometry(split, options)
        config = base_config(split, backbone, "qwen2_moe", "Qwen2MoeForCausalLM", provenance)
        return config | {
            "qkv_bias": True,
            "intermediate_size": geo.dense_width,
            "moe_intermediate_size": geo.width,
            "shared_expert_intermediate_size": geo.shared or options.align,
            "num_experts": geo.experts,
            "num_experts_per_tok": geo.top_k,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(geo.dense),
            "use_sliding_window": False,
        }

    def layer_tensors(
        self, split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
    ) -> dict[str, Tensor]:
        """See :class:`Target`."""
        import torch

        from moesaic.targets import tensors

        geo = geometry(split, options)
        kept = tensors.kept_tensors(split, layer, copied)
        attention = f"{split.anatomy.layer_path(layer)}.self_attn"
        for name in ("q_proj", "k_proj", "v_proj"):
            kept.setdefault(f"{attention}.{name}.bias", tensors.zeros_like_rows(kept[f"{attention}.{name}.weight"]))
        if layer in geo.dense:
            return kept | tensors.dense_ffn(split, layer, copied, packed, geo.dense_width)
        moe = tensors.moe_layer(split, layer, copied, packed, options, normalised=False)
        gate_1D = torch.randn(1, split.anatomy.d_model, generator=torch.Generator().manual_seed(layer)) * _GATE
        experts = [expert.padded(geo.width).scaled(self.factor(split, options)) for expert in moe.experts]
        shared = moe.shared.padded(geo.shared or options.align).scaled(2)
        return (
            kept
            | tensors.expert_tensors(f"{moe.path}.experts", experts)
            | shared.tensors(f"{moe.path}.shared_expert")
            | {
                f"{moe.path}.gate.weight": moe.router.weight_ED,
                f"{moe.path}.shared_expert_gate.weight": gate_1D,
            }
        )


TARGET = Qwen2MoE(
    name="qwen2_moe",
    summary="shared expert behind a gate, dense layers anywhere",
    engines=("transformers", "vLLM", "SGLang", "llama.cpp's converter"),
    limits=Limits(qkv_bias=True, any_head_dim=False, dense_layers="any", softmax_topk=False),
    normalised=False,
    times="experts",
    vllm=VLLMGaps(natural_heads=True, asks_qkv_bias=True),
)
