"""GLM-4.5's architecture, the universal target: ungated shared expert, sigmoid router in fp32, leading dense layers.

Weights of 1, three ways:

- Normalised, where all layers have one top-k: w_i = K sigmoid(eps z_i) / sum_topk; exactly 1 for K = 1, and where all
  experts are always on: then z = 0.
- Plain, where layers differ: w = 2 sigmoid(eps z) = 1 + eps z / 2. Missing experts of a layer are dead (bias -10),
  missing active ones are experts of zeros that are always chosen (bias +10).
- Paired (``exact_weights``) [OURS]: expert e becomes a group of two, the expert with a router row of zeros, and a
  twin of zeros with the row of e and bias -1. The sum of both scores, sigmoid(z) - 1/2, ranks the groups, K of them
  stay, and in these the experts win over their twins, with weight 2 sigmoid(0) = 1.

The ``sigmoid`` gate, w = 2 sigmoid(z), is the architecture's own form: rows are the plan's, ``e_score_correction_bias``
is its selection bias, exactly. Layers of other gates beside such layers count as layers that differ; where those are
paired, the twins of a ``sigmoid`` layer's experts are never chosen.

A router bias b becomes ``e_score_correction_bias``: sigmoid(eps z) + eps b / 4 ranks like z + b up to terms of eps^2.

Known limits: engines overlook tied embeddings, so the head is written; transformers wants two experts at least; the
shared expert's width is a multiple of an expert's, and a model without one gets one of zeros. Paired routing was run in
transformers, llama.cpp and vLLM, on CPUs.

Axes: E experts, X experts as written, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesaic.blueprint.shape import FFNShape
from moesaic.targets.backbone import read_backbone
from moesaic.targets.base import Packed, Split, Target, TargetOptions, VLLMGaps, approximates
from moesaic.targets.config import Geometry, base_config, geometry
from moesaic.targets.limits import Limits

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.targets.parts import Branch
    from moesaic.targets.tensors import MoELayer

_PINNED, _DEAD = 10.0, -10.0

_BEHIND = -1.0
"""Bias of a twin: below its expert's 1/2 for any score, and the sum of both is near zero, where fp32 is finest."""


class Glm4MoE(Target):
    """See the file's own text."""

    def exact(self, split: Split, options: TargetOptions) -> bool:
        """See :class:`Target`."""
        return _paired(split, options) or not approximates(split, normalised=_normalised(split))

    def stored(self, shape: FFNShape, split: Split, options: TargetOptions) -> tuple[int, int]:
        """See :class:`Target`."""
        geo = geometry(split, options)
        experts = _slots(split, geo) * (2 if _paired(split, options) else 1)
        return (experts + max(1, geo.shared_multiple)) * geo.width, experts

    def config_json(self, split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
        """See :class:`Target`."""
        backbone = read_backbone(split.anatomy)
        geo = geometry(split, options)
        config = base_config(split, backbone, "glm4_moe", "Glm4MoeForCausalLM", provenance)
        paired = _paired(split, options)
        normalised = _normalised(split) and not paired
        slots = _slots(split, geo)
        return config | {
            "rope_parameters": {**backbone.rope, "partial_rotary_factor": backbone.partial_rotary},
            "partial_rotary_factor": backbone.partial_rotary,
            "attention_bias": backbone.qkv_bias,
            "use_qk_norm": backbone.qk_norm == "head",
            "intermediate_size": geo.dense_width,
            "moe_intermediate_size": geo.width,
            "n_routed_experts": 2 * slots if paired else slots,
            "n_shared_experts": max(1, geo.shared_multiple),  # it cannot be absent
            "num_experts_per_tok": geo.top_k,
            "n_group": slots if paired else 1,
            "topk_group": geo.top_k if paired else 1,
            "first_k_dense_replace": len(geo.dense),
            "norm_topk_prob": normalised,
            "routed_scaling_factor": float(geo.top_k) if normalised else 2.0,
            "num_nextn_predict_layers": 0,
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
        paired = _paired(split, options)
        moe = tensors.moe_layer(
            split, layer, copied, packed, options, normalised=_normalised(split), exact_weights=paired
        )
        experts, rows_XD, bias_X = _routed(moe, geo, _slots(split, geo))
        if paired:
            experts, rows_XD, bias_X = _with_twins(experts, rows_XD, bias_X, own_weights=moe.plan.gate == "sigmoid")
        return (
            kept
            | tensors.expert_tensors(f"{moe.path}.experts", experts)
            | moe.shared.padded(max(1, geo.shared_multiple) * geo.width).tensors(f"{moe.path}.shared_experts")
            | {f"{moe.path}.gate.weight": rows_XD, f"{moe.path}.gate.e_score_correction_bias": bias_X}
        )


TARGET = Glm4MoE(
    name="glm4_moe",
    summary="the universal one: shared expert, sigmoid router, leading dense layers",
    engines=("transformers", "vLLM", "SGLang"),
    limits=Limits(
        qkv_bias=True,
        qk_norm=("none", "head"),
        partial_rotary=True,
        dense_layers="leading",
        unequal_layers=True,
        softmax_topk=False,
        sigmoid=True,
        router_bias=True,
    ),
    vllm=VLLMGaps(unties=True),
)


def _routed(moe: MoELayer, geo: Geometry, slots: int) -> tuple[list[Branch], Tensor, Tensor]:
    """A layer's experts, router rows and biases, filled up to ``slots``."""
    import torch

    pinned = geo.top_k - moe.plan.top_k
    dead = slots - len(moe.experts) - pinned
    spare = moe.experts[0].zeros(geo.width)
    bias_X = torch.cat([_bias(moe), torch.full((pinned,), _PINNED), torch.full((dead,), _DEAD)])
    rows_XD = torch.nn.functional.pad(moe.router.weight_ED, (0, 0, 0, pinned + dead))
    return [*(expert.padded(geo.width) for expert in moe.experts), *[spare] * (pinned + dead)], rows_XD, bias_X


def _bias(moe: MoELayer) -> Tensor:
    """What is added to the sigmoid of the scores for choosing. A common shift keeps it above zero: the ranking stays,
    and engines set experts outside the chosen groups to zero."""
    import torch

    if moe.plan.gate != "sigmoid":
        return moe.router.bias_E / 4
    bias_E = moe.plan.selection_bias
    return torch.zeros(len(moe.experts)) if bias_E is None else (bias_E - bias_E.min()).float()


def _with_twins(
    experts: list[Branch], rows_XD: Tensor, bias_X: Tensor, *, own_weights: bool
) -> tuple[list[Branch], Tensor, Tensor]:
    """Each expert in a group with its twin: (expert 0, twin 0, expert 1, twin 1, ...).

    ``own_weights``: the experts keep the scores, as their weights come from them, and the twins are idle.
    """
    import torch

    twin, idle_XD = experts[0].zeros(experts[0].width), torch.zeros_like(rows_XD)
    return (
        [branch for expert in experts for branch in (expert, twin)],
        torch.stack([rows_XD, idle_XD] if own_weights else [idle_XD, rows_XD], dim=1).flatten(0, 1),
        torch.stack([bias_X, torch.full_like(bias_X, _BEHIND)], dim=1).flatten(),
    )


def _normalised(split: Split) -> bool:
    """Whether weights can be divided by their sum: not where layers differ in top-k (experts of zeros would count) or
    have weights of their own."""
    return len({shape.top_k for shape in split.routed}) == 1 and not any(s.gate == "sigmoid" for s in split.routed)


def _paired(split: Split, options: TargetOptions) -> bool:
    return options.exact_weights and approximates(split, normalised=_normalised(split))


def _slots(split: Split, geo: Geometry) -> int:
    """Experts of every layer: room for each layer's own and for the always chosen ones that fill up its top-k."""
    return max(2, *(shape.experts + geo.top_k - shape.top_k for shape in split.routed))
