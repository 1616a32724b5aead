"""The oracle of the tests: what a :class:`LayerPlan` means on a dense FFN, written for the reader and not for speed.

It starts from the dense weights and the plan, token by token and expert by expert, and shares no code with the runtime
or the materialiser.

Axes: T tokens, D model width, F neurons, E experts, M neurons of one expert, K chosen experts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan
from moesaic.nn.ffn import FFNWeights, combine


def reference_ffn(
    weights: FFNWeights,
    plan: LayerPlan,
    x_TD: Tensor,
    *,
    all_experts_on: bool = False,
    undecided_TF: Tensor | None = None,
) -> Tensor:
    """Output y_TD of the converted FFN, computed in the dtype of ``x_TD``.

    Args:
        weights: The dense FFN as it is stored. What the plan changes is rounded to the dtype of the tensor that it
            replaces, as the written checkpoint rounds it; only then is it computed with.
        plan: Its split, with fade, readout, expert scale and bias.
        x_TD: Inputs, at least as precise as ``weights``; the router reads them in fp32.
        all_experts_on: Every expert counts once with weight 1, whatever the router says.
        undecided_TF: Of a ``low_bit`` router, what another computation chose, bool: it decides where scores are equal
            to within rounding; see :func:`choose_neurons`.

    The work per token is one product with the shared neurons and one with each chosen expert.
    """
    if plan.router.kind == "low_bit":
        chosen_TF = None if all_experts_on else choose_neurons(weights, plan, x_TD, undecided_TF)
        return _of_neurons(weights, plan, x_TD, chosen_TF)
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


UNDECIDED = 1e-5
"""Scores that differ by less, relative to the least that is chosen, are equal to within the rounding of fp32 sums."""


def choose_neurons(weights: FFNWeights, plan: LayerPlan, x_TD: Tensor, undecided_TF: Tensor | None = None) -> Tensor:
    """The neurons that a ``low_bit`` router chooses, bool [T, F]: the ``top_k`` of largest score, of equal ones those
    that come first; or all that reach its threshold.

    Scores are sums in fp32, and another order of summation gives slightly others. Where ``undecided_TF``, which another
    computation chose, has as many neurons as the router allows and differs only within :data:`UNDECIDED`, it is right.
    """
    t = plan.router.tensors
    if plan.int8:
        middle = _int8(weights, plan, middle=True)
        up_FD, gate_FD = middle.up_FD, middle.gate_FD
    else:
        up_FD = decoded(plan, "up", weights.d_model)
        gate_FD = decoded(plan, "gate", weights.d_model) if weights.gated else None
    score_TF = []
    for x_D in x_TD.float():
        up_F = up_FD @ x_D
        score_TF.append(_neuron_scores(weights, up_F, None if gate_FD is None else gate_FD @ x_D) * t["norm"])
    chosen_TF = torch.zeros(len(x_TD), plan.d_ff, dtype=torch.bool)
    for i, score_F in enumerate(score_TF):
        if "threshold" in t:
            chosen_TF[i], least = score_F >= t["threshold"], float(t["threshold"])
        else:
            scores = score_F.tolist()
            order = sorted(range(plan.d_ff), key=lambda j, scores=scores: (-scores[j], j))
            chosen_TF[i, order[: plan.top_k]], least = True, scores[order[plan.top_k - 1]]
        if undecided_TF is not None:
            far_F = (score_F - least).abs() > UNDECIDED * least
            agrees = torch.equal(undecided_TF[i] & far_F, chosen_TF[i] & far_F)
            if agrees and ("threshold" in t or int(undecided_TF[i].sum()) == plan.top_k):
                chosen_TF[i] = undecided_TF[i]
    return chosen_TF


def _neuron_scores(weights: FFNWeights, up_F: Tensor, gate_F: Tensor | None) -> Tensor:
    if weights.up_bias_F is not None:
        up_F = up_F + weights.up_bias_F.float()
    if gate_F is None:
        return weights.act(up_F).abs()
    if weights.gate_bias_F is not None:
        gate_F = gate_F + weights.gate_bias_F.float()
    return combine(weights.activation, weights.act, gate_F, up_F).abs()


def decoded(plan: LayerPlan, part: Literal["up", "gate"], d_model: int) -> Tensor:
    """The low-bit copy of a projection, fp32 [F, D], weight by weight of a block as the format says."""
    bits, group, t = plan.router.bits, plan.router.group, plan.router.tensors
    block_FNB = t[f"{part}_codes"].int().unflatten(1, (-1, 8 * bits))
    codes = []
    for i in range(64):
        if bits == 4:
            codes.append(block_FNB[:, :, 16 * (i // 32) + i % 16] >> 4 * (i // 16 % 2) & 15)
            continue
        low_FN = block_FNB[:, :, i % 16] >> 2 * (i // 16) & 3
        high_FN = block_FNB[:, :, 16 + i // 8] >> i % 8 & 1 if bits == 3 else 0
        codes.append(low_FN + 4 * high_FN)
    codes_FD = torch.stack(codes, dim=2).flatten(1)[:, :d_model]
    of_group_D = torch.arange(d_model) // group
    return t[f"{part}_scale"].float()[:, of_group_D] * codes_FD + t[f"{part}_offset"].float()[:, of_group_D]


def _of_neurons(weights: FFNWeights, plan: LayerPlan, x_TD: Tensor, chosen_TF: Tensor | None) -> Tensor:
    """Each token's chosen neurons, alone; None for all."""
    down_DF = weights.down_DF if plan.readout is None else plan.readout.to(weights.down_DF.dtype)
    stored = replace(weights, down_DF=down_DF)
    if plan.int8:
        stored = _int8(weights, plan)
    stored = stored.to(x_TD.dtype)
    if chosen_TF is None:
        return stored(x_TD)
    rows = [
        stored.take(chosen_F.nonzero().flatten(), keep_down_bias=True)(x_D)
        for x_D, chosen_F in zip(x_TD, chosen_TF, strict=True)
    ]
    return torch.stack(rows) if rows else torch.zeros_like(x_TD)


def _int8(weights: FFNWeights, plan: LayerPlan, *, middle: bool = False) -> FFNWeights:
    """The FFN as it is stored in int8, with matrices in fp32; ``middle``: gate and up by their high halves alone."""

    def rounded(matrix_FD: Tensor, middle: bool) -> Tensor:
        groups = []
        for part_FM in matrix_FD.float().split(plan.router.group, dim=1):
            scale_F1 = (part_FM.abs().amax(dim=1, keepdim=True) / 127).bfloat16().float()
            code_FM = torch.where(scale_F1 > 0, part_FM / scale_F1, torch.zeros(())).round().clamp(-127, 127)
            groups.append(scale_F1 * (16 * torch.floor(code_FM / 16) + 8 if middle else code_FM))
        return torch.cat(groups, dim=1)

    down_DF = weights.down_DF if plan.readout is None else plan.readout
    return replace(
        weights,
        gate_FD=None if weights.gate_FD is None else rounded(weights.gate_FD, middle),
        up_FD=rounded(weights.up_FD, middle),
        down_DF=rounded(down_DF.to(weights.down_DF.dtype).T, False).T,
    )


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
