"""FlexOlmo's architecture, the MoE of OLMo 2: norms after attention and FFN, one norm over all query and all key heads.

No shared expert: shared neurons are copied into every expert, down projections of routed neurons are multiplied by K.
Weights of 1: rows scaled by eps; the router reads the residual stream itself, whose size is not known here, so eps is
relative to a deviation of 1.

Known limits: every layer has experts; the copies cost memory and, for K > 1, time; vLLM runs it through its
transformers backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesaic.targets.backbone import read_backbone
from moesaic.targets.base import Packed, Split, Target, TargetOptions
from moesaic.targets.config import base_config, geometry
from moesaic.targets.limits import Limits

if TYPE_CHECKING:
    from torch import Tensor


class FlexOlmo(Target):
    """See the file's own text."""

    def config_json(self, split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
        """See :class:`Target`."""
        backbone = read_backbone(split.anatomy)
        geo = geometry(split, options)
        config = base_config(split, backbone, "flex_olmo", "FlexOlmoForCausalLM", provenance)
        return config | {
            "attention_bias": backbone.qkv_bias,
            "intermediate_size": geo.shared + geo.width,
            "num_experts": geo.experts,
            "num_experts_per_tok": geo.top_k,
            "norm_topk_prob": True,
        }

    def layer_tensors(
        self, split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
    ) -> dict[str, Tensor]:
        """See :class:`Target`."""
        from moesaic.targets import tensors

        moe = tensors.moe_layer(split, layer, copied, packed, options, normalised=True)
        experts = tensors.replicated(moe, geometry(split, options))
        return (
            tensors.kept_tensors(split, layer, copied)
            | tensors.expert_tensors(f"{moe.path}.experts", experts)
            | {f"{moe.path}.gate.weight": moe.router.weight_ED}
        )


TARGET = FlexOlmo(
    name="flex_olmo",
    summary="no shared expert; OLMo 2's norms",
    engines=("transformers", "vLLM"),
    limits=Limits(qkv_bias=True, o_bias=True, qk_norm=("full",), post_norm=True, shared_expert=False),
    times="top_k",
)
