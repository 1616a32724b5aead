"""What an architecture can hold, as data, and the reasons why a split model does not fit. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moesaic.targets.backbone import Backbone, QKNorm, no_backbone, read_backbone
from moesaic.targets.base import Split

if TYPE_CHECKING:
    from moesaic.blueprint.layer import LayerPlan


@dataclass(frozen=True)
class Limits:
    """What fits into an architecture, in every engine that loads it.

    Attributes:
        qkv_bias, o_bias: Biases of these projections.
        qk_norm: Norms of queries and keys that it computes; one that is missing here cannot be left out or added.
        post_norm: Whether norms stand after attention and FFN; if not, before.
        any_head_dim: Heads whose widths do not add up to the model's.
        partial_rotary, window, multipliers: See :class:`Backbone`.
        dense_layers: Where layers may stay dense.
        unequal_layers: Layers may differ in number of experts and top-k.
        softmax_topk: Experts can be weighed by the softmax over the chosen scores.
        sigmoid: Experts can be weighed by 2 sigmoid(z), with a selection bias on the sigmoid of the scores.
        router_bias: The router's bias, where weights are 1.
        selection_bias: A bias added to the softmax of the scores for choosing.
        output_bias: A bias of the FFN's output.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: tuple[QKNorm, ...] = ("none",)
    post_norm: bool = False
    any_head_dim: bool = True
    partial_rotary: bool = False
    window: bool = False
    multipliers: bool = False
    dense_layers: Literal["none", "leading", "any"] = "none"
    unequal_layers: bool = False
    softmax_topk: bool = True
    sigmoid: bool = False
    router_bias: bool = False
    selection_bias: bool = False
    output_bias: bool = False


def has_experts(plan: LayerPlan | None) -> bool:
    """Whether a layer's FFN has routed experts; without them it is a dense FFN, converted or not."""
    return plan is not None and len(plan.experts) > 0


def dense_layers(split: Split) -> list[int]:
    """Decoder layers whose FFN has no routed experts."""
    return [layer for layer in range(split.anatomy.num_layers) if not has_experts(split.plan_of(layer))]


def all_on(plan: LayerPlan) -> bool:
    """Whether every expert is chosen always."""
    return plan.top_k == len(plan.experts)


def weighs_one(plan: LayerPlan) -> bool:
    """Whether a chosen expert always counts with weight 1."""
    if plan.router.kind == "static" or plan.gate == "uniform":
        return True
    if plan.gate == "scaled":
        return plan.gate_scale is None or not bool(plan.gate_scale.any())
    return plan.gate == "softmax_topk" and plan.top_k == 1


def always_on(plan: LayerPlan) -> bool:
    """Whether every expert counts with weight 1 for every token, so that no score of the router matters."""
    return plan.router.kind == "static" or (all_on(plan) and weighs_one(plan))


def biased_selection(plan: LayerPlan) -> bool:
    """Whether the selection bias decides anything: it differs between experts, and not all are chosen."""
    bias_E = plan.selection_bias
    return bias_E is not None and not all_on(plan) and bool((bias_E != bias_E[0]).any())


def approximates(split: Split, *, normalised: bool) -> bool:
    """Whether a stock router only approaches the plans' weights of 1.

    ``normalised``: it divides by the sum over the chosen experts, so that a single one has weight 1 whatever its score.
    """
    return any(
        weighs_one(plan) and not always_on(plan) and not (normalised and plan.top_k == 1)
        for plan in split.plans.values()
    )


def reasons_against(split: Split, limits: Limits) -> list[str]:
    """Why ``split`` does not fit into ``limits``; [] if it does. See :meth:`TargetModule.reasons`."""
    if reason := no_backbone(split.anatomy):
        return [reason]
    reasons = [*_backbone_reasons(read_backbone(split.anatomy), limits), *stock_attention_reasons(split)]
    if split.plans:
        reasons += _layer_reasons(split, limits)
        plans = {path: plan for path, plan in split.plans.items() if has_experts(plan)}
        for check in (_width_reason, _router_reason, _gate_reason, _selection_reason):
            reasons += _grouped(plans.items(), lambda plan, check=check: check(plan, limits))
        reasons += _grouped(split.plans.items(), lambda plan: _bias_reason(plan, limits))
    return reasons


def stock_attention_reasons(split: Split) -> list[str]:
    """Why no stock architecture holds the plans for attention; [] if there are none."""
    if not split.attention:
        return []
    more = f" and {len(split.attention) - 1} more" if len(split.attention) > 1 else ""
    return [f"{next(iter(split.attention))}{more}: the attention is pruned: only target moesaic computes that"]


def _backbone_reasons(backbone: Backbone, limits: Limits) -> Iterable[str]:
    if backbone.qkv_bias and not limits.qkv_bias:
        yield "query, key and value have biases, which it has not: glm4_moe and qwen2_moe have"
    if backbone.o_bias and not limits.o_bias:
        yield (
            "the attention output has a bias, which it has not: granitemoeshared and ernie4_5_moe have, "
            "qwen3_moe for models with qk-norm"
        )
    if backbone.qk_norm not in limits.qk_norm:
        own = " or ".join(limits.qk_norm)
        yield f"norm of queries and keys is {backbone.qk_norm!r}, its own {own!r}: {_QK_NORM_HINT[backbone.qk_norm]}"
    if backbone.post_norm != limits.post_norm:
        places = {True: "after", False: "before"}
        yield (
            f"norms stand {places[backbone.post_norm]} attention and FFN, its own {places[limits.post_norm]}: "
            f"{'flex_olmo' if backbone.post_norm else 'glm4_moe'} fits"
        )
    if not backbone.natural_head_dim and not limits.any_head_dim:
        yield f"head_dim is {backbone.head_dim}, not hidden_size / heads: glm4_moe, qwen3_moe and mixtral read head_dim"
    if backbone.partial_rotary != 1.0 and not limits.partial_rotary:
        yield f"partial_rotary_factor is {backbone.partial_rotary:g}, it rotates whole heads: glm4_moe rotates a part"
    if backbone.window is not None and not (limits.window and backbone.window_everywhere):
        where = "every layer" if backbone.window_everywhere else "some layers"
        yield f"sliding window of {backbone.window} tokens in {where}: mixtral and qwen3_moe have one in every layer"
    if not backbone.plain_multipliers and not limits.multipliers:
        yield "the model has multipliers (embedding, residual, logits or attention): granitemoeshared has them"
    if backbone.ffn_bias:
        yield "the FFNs have biases (mlp_bias): no stock expert has any"


_QK_NORM_HINT = {
    "none": "glm4_moe, granitemoeshared and mixtral have none",
    "head": "glm4_moe and qwen3_moe have one per head",
    "full": "flex_olmo has one over all heads",
}


def _layer_reasons(split: Split, limits: Limits) -> Iterable[str]:
    dense = dense_layers(split)
    if len(dense) == split.anatomy.num_layers:
        yield "no FFN has routed experts: target dense holds it"
        return
    names = ", ".join(str(layer) for layer in dense[:5]) + (" ..." if len(dense) > 5 else "")
    if dense and limits.dense_layers == "none":
        yield f"layers {names} stay dense, its layers have experts: glm4_moe takes leading dense ones, qwen2_moe any"
    if limits.dense_layers == "leading" and dense != list(range(len(dense))):
        yield f"layers {names} stay dense, it takes them at the start only: qwen2_moe and qwen3_moe take them anywhere"
    shapes = sorted({(len(plan.experts), plan.top_k) for plan in split.plans.values() if plan.experts})
    if len(shapes) > 1 and not limits.unequal_layers:
        text = ", ".join(f"top-{k} of {n}" for n, k in shapes[:4])
        yield f"layers differ in experts and top-k ({text}): glm4_moe takes unequal layers"


def _width_reason(plan: LayerPlan, _limits: Limits) -> str | None:
    if plan.varied:
        return "experts of different widths: it would compute the widest for every token; convert with widths=equal"
    return None


def _router_reason(plan: LayerPlan, limits: Limits) -> str | None:
    router = plan.router
    if router.kind == "gated":
        return "router of kind 'gated': only linear ones exist there; convert with --router oracle"
    if router.affine and "bias" in router.tensors and not all_on(plan):
        if not (limits.router_bias and weighs_one(plan)):
            return (
                "the router has a bias: glm4_moe holds one where weights are 1; elsewhere fit the router without bias"
            )
        if router.normalise_input:
            return "router with a bias on normalised inputs: no stock router normalises its input"
    if router.normalise_input and not weighs_one(plan):
        return "weights from a router on normalised inputs: no stock router normalises its input; use gate 'uniform'"
    return None


def _gate_reason(plan: LayerPlan, limits: Limits) -> str | None:
    if weighs_one(plan) or (plan.gate == "softmax_topk" and limits.softmax_topk):
        return None
    if plan.gate == "sigmoid":
        return None if limits.sigmoid else "gate 'sigmoid': glm4_moe weighs experts so"
    if plan.gate == "scaled":
        return "gate 'scaled' with trained scales: no stock architecture has weights 1 + p s; use gate 'softmax_topk'"
    return "gate 'softmax_topk': granitemoeshared, mixtral, qwen3_moe and ernie4_5_moe weigh experts so"


def _selection_reason(plan: LayerPlan, limits: Limits) -> str | None:
    if not biased_selection(plan) or (plan.gate == "sigmoid" and limits.sigmoid):
        return None
    if plan.gate == "sigmoid":
        return "a selection bias on the sigmoid of the scores: glm4_moe has one"
    as_softmax = plan.router.affine and "bias" not in plan.router.tensors and not plan.router.normalise_input
    if limits.selection_bias and as_softmax and (plan.top_k == 1 or plan.gate == "softmax_topk"):
        return None
    return (
        "a selection bias on the softmax of the scores: ernie4_5_moe has one, with gate 'softmax_topk' or top-1; "
        "a linear router fitted to the decisions (--router decisions) contains it"
    )


def _bias_reason(plan: LayerPlan, limits: Limits) -> str | None:
    if plan.bias is None or limits.output_bias:
        return None
    return "the FFN's output has a bias: ernie4_5_moe has one (transformers only)"


def _grouped(plans: Iterable[tuple[str, LayerPlan]], check: Callable[[LayerPlan], str | None]) -> list[str]:
    """Each distinct reason once, with the first FFN that it concerns and the number of the others."""
    paths: dict[str, list[str]] = {}
    for path, plan in plans:
        if reason := check(plan):
            paths.setdefault(reason, []).append(path)
    return [
        f"{found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}: {reason}"
        for reason, found in paths.items()
    ]
