"""The oracle of the tests: what a :class:`LayerPlan` means on a dense FFN, written for the reader and not for speed.

It starts from the dense weights and the plan, token by token and expert by expert, and shares no code with the runtime
or the materialiser.

Axes: T tokens, D model width, F neurons, E experts, M neurons of one expert, K chosen experts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan
from moesaic.nn.ffn import FFNWeights, combine


def reference_ffn(weights: FFNWeights, plan: LayerPlan, x_TD: Tensor, *, all_experts_on: bool = False) -> Tensor:
    """Output y_TD of the converted FFN, computed in the dtype of ``x_TD``.

    Args:
        weights: The dense FFN as it is stored. What the plan changes is rounded to the dtype of the tensor that it
            replaces, as the written checkpoint rounds it; only then is it computed with.
        plan: Its split, with fade, readout, expert scale and bias.
        x_TD: Inputs, at least as precise as ``weights``; the router reads them in fp32.
        all_experts_on: Every expert counts once with weight 1, whatever the router says.

    The work per token is one product with the shared neurons and one with each chosen expert.
    """
    part = cache(lambda e: _part(weights, plan, e).to(x_TD.dtype))
    bias_D = weights.down_bias_D if plan.bias is None else plan.bias.to(weights.down_DF.dtype)
    rows = []
    for x_D in x_TD:
        y_D = part(-1)(x_D)
        every = [(e, x_D.new_ones(())) for e in range(len(plan.experts))]
        for e, weight in every if all_experts_on else choose(weights, plan, x_D):
            y_D = y_D + weight.to(x_D.dtype) * part(e)(x_D)
        rows.append(y_D if bias_D is None else y_D + bias_D.to(x_TD.dtype))
    return torch.stack(rows) if rows else torch.zeros_like(x_TD)


def reference_scores(weights: FFNWeights, plan: LayerPlan, x_D: Tensor) -> Tensor:
    """Router scores z_E of one token in fp32; zeros for the static router."""
    router = plan.router
    x_D = x_D.float()
    if router.normalise_input:
        x_D = x_D / x_D.norm().clamp_min(1e-12)
    if router.kind == "static":
        return torch.zeros(len(plan.experts))
    t = {name: tensor.float() for name, tensor in router.tensors.items()}
    if router.kind == "low_rank":
        return t["weight"] @ (t["reduce"] @ x_D) + t.get("bias", 0)
    if router.kind == "linear":
        return t["weight"] @ x_D + t.get("bias", 0)
    act = weights.act
    up_E = t["up"] @ x_D + t.get("up_bias", 0)
    if "gate" not in t:
        return act(up_E).abs()
    return combine(weights.activation, act, t["gate"] @ x_D + t.get("gate_bias", 0), up_E).abs()


def choose(weights: FFNWeights, plan: LayerPlan, x_D: Tensor) -> list[tuple[int, Tensor]]:
    """The experts of one token and their weights, best first; of equal experts the one of lower index."""
    if not plan.experts:
        return []
    z_E = reference_scores(weights, plan, x_D)
    p_E = torch.sigmoid(z_E) if plan.gate == "sigmoid" else torch.softmax(z_E, dim=0)
    key_E = z_E if plan.selection_bias is None else p_E + plan.selection_bias.float()
    chosen = sorted(range(len(plan.experts)), key=lambda e: (-key_E[e].item(), e))[: plan.top_k]
    if plan.gate == "uniform" or plan.router.kind == "static":
        return [(e, torch.ones(())) for e in chosen]
    if plan.gate == "scaled":
        s_E = torch.zeros(len(plan.experts)) if plan.gate_scale is None else plan.gate_scale.float()
        return [(e, 1 + p_E[e] * s_E[e]) for e in chosen]
    if plan.gate == "sigmoid":
        return [(e, 2 * p_E[e]) for e in chosen]
    weight_K = plan.top_k * torch.softmax(z_E[chosen], dim=0)
    return list(zip(chosen, weight_K, strict=True))


def _part(weights: FFNWeights, plan: LayerPlan, e: int) -> FFNWeights:
    """Expert ``e``, or the shared network for -1, with the plan's changes to its weights, without output bias."""
    lists = [plan.shared, *plan.experts]
    index, start = lists[e + 1], sum(len(other) for other in lists[: e + 1])
    part = weights.take(index.long())
    dtype = part.down_DF.dtype
    for name, tensor in plan.projections.items():
        rows = tensor[start : start + len(index)].clone()
        rows[index < 0] = 0
        part = replace(part, **{name: rows.to(getattr(part, name).dtype)})
    if plan.readout is not None:
        columns = list(range(start, start + len(index)))
        if plan.union and e >= 0:
            place = {neuron: column for column, neuron in enumerate(plan.packed.tolist()) if column >= len(plan.shared)}
            columns = [place[neuron] if neuron >= 0 else 0 for neuron in index.tolist()]
        part = replace(part, down_DF=(plan.readout[:, columns] * (index >= 0)).to(dtype))
    if e >= 0 and plan.fade is not None:
        part = _fade(part, plan.fade.fractions[e], plan.fade.scope, index >= 0)
    if e >= 0 and plan.expert_scale is not None:
        wide = torch.promote_types(dtype, torch.float32)
        scale = plan.expert_scale[e].to(wide).reshape(-1, 1)
        part = replace(part, down_DF=(part.down_DF.to(wide) * scale).to(dtype))
    return part


def _fade(part: FFNWeights, fraction: float, scope: str, real_M: Tensor) -> FFNWeights:
    """``floor(fraction * n)`` of n competing weights become zero: the smallest, of equal ones the earlier."""
    names = [name for name in ("gate_FD", "up_FD", "down_DF") if getattr(part, name) is not None]
    matrices = {name: getattr(part, name).clone() for name in names}
    real = real_M.nonzero().flatten().tolist()
    entries: dict[str, list[list[tuple[str, int, int]]]] = {}
    for name in names:
        lines = range(matrices[name].shape[0]) if name == "down_DF" else real
        along = real if name == "down_DF" else range(matrices[name].shape[1])
        entries[name] = [[(name, i, j) for j in along] for i in lines]
    rows = [row for name in names for row in entries[name]]
    if scope == "row":
        groups = rows
    elif scope == "matrix":
        groups = [[entry for row in entries[name] for entry in row] for name in names]
    else:
        groups = [[entry for row in rows for entry in row]]
    for group in groups:
        smallest_first = sorted(group, key=lambda entry: abs(float(matrices[entry[0]][entry[1], entry[2]])))
        for name, i, j in smallest_first[: math.floor(fraction * len(group))]:
            matrices[name][i, j] = 0
    return replace(part, **matrices)
