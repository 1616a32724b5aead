"""Mixtral's architecture: softmax over the chosen scores, no shared expert, a sliding window in every layer if any.

Down projections of routed experts are multiplied by K; shared neurons are copied into every expert. Weights of 1: rows
scaled by eps.

Known limits: every layer has experts; the copies cost memory and, for K > 1, time; rounded in bf16 unless K is a power
of two.
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


class Mixtral(Target):
    """See the file's own text."""

    def config_json(self, split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
        """See :class:`Target`."""
        backbone = read_backbone(split.anatomy)
        geo = geometry(split, options)
        config = base_config(split, backbone, "mixtral", "MixtralForCausalLM", provenance)
        return config | {
            "intermediate_size": geo.shared + geo.width,
            "num_local_experts": geo.experts,
            "num_experts_per_tok": geo.top_k,
            "sliding_window": backbone.window,
        }

    def layer_tensors(
        self, split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
    ) -> dict[str, Tensor]:
        """See :class:`Target`."""
        from moesaic.targets import tensors

        moe = tensors.moe_layer(split, layer, copied, packed, options, normalised=True)
        path = f"{split.anatomy.layer_path(layer)}.block_sparse_moe"
        experts = tensors.replicated(moe, geometry(split, options))
        return (
            tensors.kept_tensors(split, layer, copied)
            | tensors.expert_tensors(f"{path}.experts", experts, ("w1", "w3", "w2"))
            | {f"{path}.gate.weight": moe.router.weight_ED}
        )


TARGET = Mixtral(
    name="mixtral",
    summary="no shared expert; sliding window",
    engines=("transformers", "vLLM", "SGLang", "llama.cpp's converter"),
    limits=Limits(window=True, shared_expert=False),
    times="top_k",
)
