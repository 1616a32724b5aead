"""From decisions to weights: an attention module and its :class:`AttentionPlan` become the tensors of a pruned one.

Axes: H heads, h head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.blueprint.attention import VALUE_TENSORS, AttentionPlan


def pack_attention(tensors: Mapping[str, Tensor], path: str, plan: AttentionPlan) -> dict[str, Tensor]:
    """The tensors of a pruned attention module that are not the dense one's, by full name; new memory, contiguous.

    Args:
        tensors: Of the dense model, by full name: at least the projections of queries and keys.
        path: Module path of the attention.
        plan: Kept rows of these projections keep their values and dtype; the predictor's tensors are fp32.
    """
    packed: dict[str, Tensor] = {}
    if plan.pairs is not None:
        packed[f"{path}.pairs"] = plan.pairs.long().clone()
        for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"):
            if (rows := tensors.get(f"{path}.{name}")) is not None:
                heads = rows.unflatten(0, (-1, plan.head_dim))
                packed[f"{path}.{name}"] = heads.index_select(1, plan.kept.to(rows.device)).flatten(0, 1)
    if plan.masks_values:
        for name in VALUE_TENSORS:
            tensor: Tensor = getattr(plan, name)
            packed[f"{path}.value_mask.{name}"] = tensor.detach().to(torch.float32, copy=True).contiguous()
    return packed
