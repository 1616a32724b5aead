"""From the trained controller to plans: hard masks within the budget, routers, attention predictors, and a report.

Deterministic: the same controller and calibration windows give the same bytes. The controller itself is not kept.

Axes: N experts, F neurons, M expert width, P pairs, H dims of an attention head; "windows" are token ids [., W].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moesaic.blueprint.attention import AttentionPlan
from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.methods.base import ModelPlan
from moesaic.methods.tomoe.attention import pair_refusal
from moesaic.methods.tomoe.config import check_exportable
from moesaic.methods.tomoe.controller import Decoded
from moesaic.methods.tomoe.gates import load
from moesaic.methods.tomoe.hard import HardGates
from moesaic.methods.tomoe.losses import coverage
from moesaic.methods.tomoe.samplers import MEDIAN
from moesaic.methods.tomoe.selection import active_width, choose_masks
from moesaic.methods.tomoe.task import ToMoETask


@torch.no_grad()
def export(task: ToMoETask, windows_HW: Tensor) -> ModelPlan:
    """The plan of a trained task.

    Args:
        task: After training.
        windows_HW: Training text that was held out; sets the caps of the value dims and gives the loads in the report.

    Raises:
        InputError: the config is a study that cannot be exported, or attention alone exceeds the budget.
    """
    config = task.config
    check_exportable(config)
    decoded, shift = task.decode()
    attention = _attention_plans(task, decoded, shift)
    if attention is not None and task.budget.values:
        attention = _capped(task, decoded, shift, attention, windows_HW)
    widths = _attention_widths(task, attention)
    costs = [cost.neuron for cost in task.budget.costs]
    logits = [(logits_NF + shift).cpu() for logits_NF in decoded.neurons]
    masks = choose_masks(
        logits,
        costs,
        task.budget.neuron_budget(*widths),
        rule=config.rule,
        widths=config.widths,
        top_k=config.top_k,
    )
    plans = [
        layer_plan(mask_NF, head.router.weight, config.top_k, config.union)
        for mask_NF, head in zip(masks, task.controller.ffn_heads, strict=True)
    ]
    gates = HardGates(plans, attention)
    usage = _usage(task, gates, windows_HW)
    report = _report(task, masks, widths, usage)
    sites = {site.path: plan for site, plan in zip(task.ffns, plans, strict=True)}
    blocks = {site.path: plan for site, plan in zip(task.attention, attention or [], strict=True)}
    return ModelPlan(sites, blocks, report)


def layer_plan(mask_NF: Tensor, router_ND: Tensor, top_k: int = 1, union: bool = False) -> LayerPlan:
    """One FFN's plan: experts padded to the widest with -1; with one expert a static plan of its neurons.

    Several experts per token count 1 / top_k each.
    """
    experts = [torch.nonzero(mask_F).flatten() for mask_F in mask_NF.cpu()]
    if len(experts) == 1:
        return LayerPlan(mask_NF.shape[1], experts[0])
    width = max(len(index) for index in experts)
    return LayerPlan(
        d_ff=mask_NF.shape[1],
        shared=torch.zeros(0, dtype=torch.int64),
        experts=tuple(torch.nn.functional.pad(index, (0, width - len(index)), value=-1) for index in experts),
        top_k=top_k,
        router=Router("linear", {"weight": router_ND.detach().float().cpu().clone()}),
        expert_scale=None if top_k == 1 else torch.full((len(experts),), 1 / top_k),
        union=union,
    )


def _attention_plans(task: ToMoETask, decoded: Decoded, shift: float) -> list[AttentionPlan] | None:
    """Plans of the masked attention blocks, uncapped; a block always keeps its likeliest pair."""
    if not task.attention:
        return None
    plans: list[AttentionPlan] = []
    for place, (site, head) in enumerate(zip(task.attention, task.controller.attention_heads, strict=True)):
        values: dict[str, Any] = {}
        if head.values and head.encoder is not None:
            values = {
                "encoder": head.encoder.weight,
                "norm_weight": head.decoder.norm.weight,
                "norm_bias": head.decoder.norm.bias,
                "decoder": head.decoder.projection.weight[: head.values],
                "embedding": decoded.embeddings[2 * place].mean(0),
            }
            values = {name: tensor.detach().float().cpu().clone() for name, tensor in values.items()}
            values["threshold"] = MEDIAN - task.config.bias
        logits_P = decoded.pairs[place]
        if logits_P is not None:
            kept_P = logits_P + shift > MEDIAN
            kept_P[logits_P.argmax()] = True
            values["pairs"] = torch.nonzero(kept_P).flatten().cpu()
        plans.append(AttentionPlan(site.head_dim, **values))
    return plans


def _capped(
    task: ToMoETask, decoded: Decoded, shift: float, attention: list[AttentionPlan], windows_HW: Tensor
) -> list[AttentionPlan]:
    """The same plans with caps K: a share of the head, or a quantile of what held-out training tokens ask for; lower
    where the neurons would be left with nothing."""
    most = task.budget.affordable_cap([float(len(plan.kept)) for plan in attention] if task.budget.pairs else None)
    if task.config.cap == "budget":
        return [replace(plan, cap=min(most, task.budget.value_cap())) for plan in attention]
    routers = [head.router.weight for head in task.controller.ffn_heads]
    masks = task.chosen_masks(decoded, shift)
    plans = [layer_plan(mask_NF, weight, task.config.top_k) for mask_NF, weight in zip(masks, routers, strict=True)]
    gates = HardGates(plans, attention)
    wanted: list[list[Tensor]] = [[] for _ in attention]
    for ids_BW in windows_HW.split(1):
        task.run(gates, ids_BW)
        for place, mask in gates.value_masks.items():
            wanted[place].append(mask.sum(-1).flatten())
    quantiles = [torch.cat(dims).quantile(task.config.cap_quantile) for dims in wanted]
    return [
        replace(plan, cap=min(most, plan.head_dim, max(1, int(dims.ceil()))))
        for plan, dims in zip(attention, quantiles, strict=True)
    ]


def _attention_widths(
    task: ToMoETask, attention: list[AttentionPlan] | None
) -> tuple[list[float] | None, list[float] | None]:
    """Query and key dims, and value dims at most, per layer; None where whole."""
    if attention is None:
        return None, None
    pairs = [float(len(plan.kept)) for plan in attention] if task.budget.pairs else None
    values = [float(plan.cap or plan.head_dim) for plan in attention] if task.budget.values else None
    return pairs, values


def _usage(task: ToMoETask, gates: HardGates, windows_HW: Tensor) -> dict[str, dict[int, Tensor]]:
    """Means over held-out tokens: load of each expert, and value dims used."""
    loads: dict[int, list[Tensor]] = {}
    dims: dict[int, list[Tensor]] = {}
    for ids_BW in windows_HW.split(1):
        task.run(gates, ids_BW)
        for place, route_TN in gates.routes.items():
            loads.setdefault(place, []).append(load(route_TN))
        for place, mask in gates.value_masks.items():
            dims.setdefault(place, []).append(mask.sum(-1).mean())
    return {
        name: {place: torch.stack(parts).mean(0) for place, parts in found.items()}
        for name, found in (("loads", loads), ("dims", dims))
    }


def _report(
    task: ToMoETask,
    masks: list[Tensor],
    widths: tuple[list[float] | None, list[float] | None],
    usage: dict[str, dict[int, Tensor]],
) -> dict[str, Any]:
    """Widths, coverage and loads per FFN, and the active ratio, at most and in the mean over held-out tokens."""
    config, budget = task.config, task.budget
    pairs, values = widths
    counts = [mask_NF.sum(-1) for mask_NF in masks]
    at_most = [active_width(count_N, config.top_k) for count_N in counts]
    in_mean = [
        config.top_k * float((count_N.cpu() * usage["loads"][place].cpu()).sum())
        if place in usage["loads"]
        else float(count_N.float().mean())
        for place, count_N in enumerate(counts)
    ]
    dims = [float(usage["dims"][place]) for place in range(len(masks))] if values is not None else None
    layers = {}
    for place, (site, count_N, mask_NF) in enumerate(zip(task.ffns, counts, masks, strict=True)):
        layers[site.path] = {
            "widths": count_N.tolist(),
            "coverage": float(coverage(mask_NF.float())),
            "loads": [round(share, 4) for share in usage["loads"].get(place, torch.ones(1)).tolist()],
            **({} if pairs is None else {"query_key_dims": int(pairs[place])}),
            **({} if values is None else {"value_cap": int(values[place])}),
            **({} if dims is None else {"value_dims_mean": dims[place]}),
        }
    return {
        "target": config.active,
        "counted": config.counted,
        "active": float(budget.active(at_most, pairs, values)) / budget.total,
        "active_mean": float(budget.active(in_mean, pairs, dims)) / budget.total,
        "active_ffn": sum(c.neuron * w for c, w in zip(budget.costs, at_most, strict=True))
        / sum(c.neuron * c.neurons for c in budget.costs),
        "coverage": sum(layer["coverage"] for layer in layers.values()) / len(layers),
        "load_max": max(max(layer["loads"]) for layer in layers.values()),
        "rule": config.rule,
        "widths": config.widths,
        "query_key_pruning": pair_refusal(task.anatomy) or ("yes" if pairs is not None else "not asked for"),
        "layers": layers,
    }
