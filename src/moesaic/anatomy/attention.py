"""Which attention modules can be pruned, and why the others cannot. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesaic.anatomy.base import Anatomy, require

if TYPE_CHECKING:
    from moesaic.blueprint.attention import AttentionPlan


@dataclass(frozen=True)
class AttentionSupport:
    """Why queries and keys (``pairs``) and values (``values``) of a model cannot be pruned; None where they can."""

    pairs: str | None
    values: str | None


def attention_support(anatomy: Anatomy) -> AttentionSupport:
    """What can be pruned in a model's attention: needs separate q_proj, k_proj, v_proj, o_proj and half-split RoPE."""
    model_type, attention = anatomy.family.model_type, anatomy.family.attention
    if attention is None or attention.fused or attention.adjacent:
        reason = f"the attention of {model_type} has not the four projections and the half-split RoPE that it takes"
        return AttentionSupport(reason, reason)
    rope = anatomy.config.get("rope_parameters") or anatomy.config.get("rope_scaling") or {}
    factor = rope.get("partial_rotary_factor", anatomy.config.get("partial_rotary_factor"))
    if factor not in (None, 1, 1.0):
        reason = f"partial_rotary_factor is {factor:g}: pairs are known for heads that are rotated whole"
        return AttentionSupport(reason, reason)
    if attention.qk_norm != "none":
        return AttentionSupport(
            f"{model_type} norms queries and keys over whole heads, so that pruned ones are not masked ones", None
        )
    return AttentionSupport(None, None)


def attention_path(anatomy: Anatomy, layer: int) -> str:
    """Module path of a decoder layer's attention, and its key in a blueprint."""
    return f"{anatomy.layer_path(layer)}.self_attn"


def heads(anatomy: Anatomy) -> int:
    """Query heads H of a layer. Raises UnsupportedModelError where config.json does not say."""
    return int(require(anatomy.config, anatomy.family.heads, anatomy.family.model_type))


def head_dim(anatomy: Anatomy) -> int:
    """Width h of an attention head. Raises UnsupportedModelError as :func:`heads` does."""
    attention = anatomy.family.attention
    given = anatomy.config.get("head_dim") or (attention and attention.head_dim)
    return int(given or anatomy.d_model // heads(anatomy))


def pruning_reasons(anatomy: Anatomy, plans: Mapping[str, AttentionPlan]) -> list[str]:
    """Why a model's attention cannot be pruned as planned; [] if it can."""
    support = attention_support(anatomy)
    paths = {attention_path(anatomy, layer) for layer in range(anatomy.num_layers)}
    reasons = []
    for path, plan in plans.items():
        refusals = [support.pairs if plan.pairs is not None else None, support.values if plan.masks_values else None]
        if path not in paths:
            reasons.append(f"{path} is no attention of this model")
        elif any(refusals):
            reasons.append(f"{path}: {next(filter(None, refusals))}")
        elif plan.head_dim != head_dim(anatomy):
            reasons.append(f"{path}: planned for heads of {plan.head_dim}, the model's have {head_dim(anatomy)}")
    return reasons
