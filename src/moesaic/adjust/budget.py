"""Another budget for experts whose widths pay for themselves: the same experts, at another price per neuron. And for
single neurons: more or fewer of them, or another threshold.

Source: ours [OURS]. Where widths are free (:mod:`moesaic.solvers.free_widths`), how many neurons a token uses depends
on the text. A blueprint keeps what each neuron is worth to each expert; with another price the experts have more or
fewer of them, and a text uses as many as it may. Router and readout stay: nothing is fitted but one price per FFN.
Where every neuron is an expert, nothing at all is fitted, or one threshold per FFN.

Axes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.adjust.router import original_sets
from moesaic.blueprint.layer import LayerPlan
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.methods.neuron_experts.threshold import with_threshold
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.free_widths import lowest_price


def check_budget(plans: Mapping[str, LayerPlan]) -> None:
    """Refuse routed FFNs, by path, that have one budget only; what is always on stays so. Raises InputError."""
    routed = {path: plan for path, plan in plans.items() if plan.router.kind != "static"}
    if fixed := [path for path, plan in routed.items() if not has_budgets(plan)]:
        raise InputError(
            f"the blueprint's {fixed[0]} has one budget: its experts have no widths of their own",
            "leave --budget out, or make it by neuron_experts, or token_clusters with split=union and widths=free",
        )
    if not routed:
        raise InputError("the blueprint routes nothing: all it keeps is always on", "leave --budget out")


def has_budgets(plan: LayerPlan) -> bool:
    """Whether a routed FFN can be given another budget."""
    return plan.worth is not None or plan.router.kind == "low_bit"


def budget_reads_text(plan: LayerPlan) -> bool:
    """Whether another budget depends on what the FFN reads: on prices or thresholds."""
    return plan.worth is not None or "threshold" in plan.router.tensors


@torch.no_grad()
def with_budget(plan: LayerPlan, weights: FFNWeights, inputs: SiteInputs | None, budget: float) -> LayerPlan:
    """The plan at the lowest price at which these inputs use at most ``budget`` of the neurons in the mean; of single
    neurons that many, or by the threshold that as many reach.

    Args:
        plan: Of one budget (:func:`has_budgets`), it stays as it is.
        weights: The dense FFN.
        inputs: From text of the kind that will be read. Without tokens, a plan that needs them stays as it is
            (:func:`budget_reads_text`).
        budget: Fraction of F. Neurons that no expert of the plan has are not stored and do not come back.
    """
    if plan.router.kind == "low_bit" and not budget_reads_text(plan):
        return replace(plan, top_k=max(1, round(budget * plan.d_ff)))
    if inputs is None or inputs.tokens == 0:
        return plan
    if plan.router.kind == "low_bit":
        return with_threshold(plan, weights, inputs, budget)
    if plan.worth is None:
        return plan
    chosen_TE = original_sets(weights.to(inputs.x_TD.dtype), plan, inputs).cpu()
    stored_F = torch.zeros(plan.d_ff, dtype=torch.bool)
    stored_F[plan.union_neurons] = True
    worth_EF = plan.worth.float() * stored_F
    count_E = chosen_TE.sum(dim=0)
    own_EF = worth_EF > lowest_price(worth_EF, count_E, max(1, round(budget * plan.d_ff)))
    priced = replace(
        plan,
        experts=tuple(own_F.nonzero().flatten() for own_F in own_EF),
        readout=None,
        load=count_E / count_E.sum(),
    )
    return priced if plan.readout is None else replace(priced, readout=_moved(plan.readout, plan, priced))


def _moved(readout_DP: Tensor, old: LayerPlan, new: LayerPlan) -> Tensor:
    """The readout's columns in the order of the new plan's rows."""
    place_F = torch.full((old.d_ff,), -1)
    place_F[old.packed] = torch.arange(len(old.packed))
    return readout_DP[:, place_F[new.packed]]
