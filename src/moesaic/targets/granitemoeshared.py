"""Granite's MoE with a shared expert of any width: router weights are the softmax over the chosen scores, w = K
softmax_topk(z).

The sum of the weights is 1, so down projections of routed experts are multiplied by K (rounded in bf16 unless K is a
power of two). Weights of 1: rows scaled by eps. Llama's attention is Granite's with ``attention_multiplier`` 1 /
sqrt(head_dim) and other multipliers 1.

Known limits: vLLM has no biases in this attention and takes hidden_size / heads for head_dim; SGLang ignores RoPE
scaling.

Axes: E experts, D model width, M neurons per expert.
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


class GraniteMoEShared(Target):
    """See the file's own text."""

    def config_json(self, split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
        """See :class:`Target`."""
        backbone = read_backbone(split.anatomy)
        geo = geometry(split, options)
        config = base_config(split, backbone, "granitemoeshared", "GraniteMoeSharedForCausalLM", provenance)
        return config | {
            **backbone.multipliers,
            "attention_bias": backbone.qkv_bias,
            "intermediate_size": geo.width,
            "shared_intermediate_size": geo.shared,
            "num_local_experts": geo.experts,
            "num_experts_per_tok": geo.top_k,
        }

    def layer_tensors(
        self, split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
    ) -> dict[str, Tensor]:
        """See :class:`Target`."""
        import torch

        from moesaic.targets import tensors

        geo = geometry(split, options)
        kept = tensors.kept_tensors(split, layer, copied)
        moe = tensors.moe_layer(split, layer, copied, packed, options, normalised=True)
        path = split.anatomy.layer_path(layer)
        experts = [expert.padded(geo.width).scaled(self.factor(split, options)) for expert in moe.experts]
        made = {
            f"{path}.block_sparse_moe.input_linear.weight": torch.stack(
                [torch.cat([e.gate_MD, e.up_MD]) for e in experts]
            ),
            f"{path}.block_sparse_moe.output_linear.weight": torch.stack([e.down_DM for e in experts]),
            f"{path}.block_sparse_moe.router.layer.weight": moe.router.weight_ED,
        }
        if geo.shared:
            shared = moe.shared.padded(geo.shared)
            made |= {
                f"{path}.shared_mlp.input_linear.weight": torch.cat([shared.gate_MD, shared.up_MD]),
                f"{path}.shared_mlp.output_linear.weight": shared.down_DM.clone(memory_format=torch.contiguous_format),
            }
        backbone = read_backbone(split.anatomy)
        if backbone.qkv_bias and not backbone.o_bias:  # one switch for all four
            o_proj = f"{path}.self_attn.o_proj"
            made[f"{o_proj}.bias"] = tensors.zeros_like_rows(kept[f"{o_proj}.weight"])
        return kept | made


TARGET = GraniteMoEShared(
    name="granitemoeshared",
    summary="shared expert of any width, softmax over the chosen; Granite's multipliers",
    engines=("transformers", "vLLM", "SGLang"),
    limits=Limits(qkv_bias=True, o_bias=True, any_head_dim=False, multipliers=True),
    times="top_k",
    vllm=VLLMGaps(unread_biases=("q_proj", "k_proj", "v_proj", "o_proj"), natural_heads=True),
)
