"""A linear router for any plan: fitted to what the plan's own router decides, or to the experts that do most.

Source: ours [OURS]. Stock MoE engines score experts by z = W x and nothing else. Routers of another form (CMoE's gated
one) are replaced here, and a linear router can be fitted to any partition. docs/routers.md says what each choice keeps.

Axes: T tokens, D model width, F packed neurons, E routed experts, K active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.adjust.router_config import RouterFitConfig
from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.materialise.apply import build_ffn
from moesaic.materialise.pack import TENSOR_NAMES, pack
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers import router_fit as solver

_BATCH = 2048


@dataclass(frozen=True)
class RouterFit:
    """What a router fit reached. All shares are of the held-out tokens, which also chose ridge and iterations.

    Attributes:
        mode: ``decisions`` or ``oracle``.
        tokens: Tokens fitted on.
        heldout: Tokens held out.
        ridge: Ridge strength that was best there, relative; 0 when every expert is active and nothing had to be fitted.
        iterations: Iterations of the refinement that led to the result; 0 is the closed form.
        agreement: Mean overlap of the fitted router's experts with the original router's.
        agreement_oracle: The same with the oracle's: the K experts of largest output energy.
        original_oracle: Overlap of the original router with the oracle.
        energy: Share of the routed experts' output energy that the fitted router keeps, mean over tokens.
        energy_original: The same for the original router.
        energy_oracle: The same for the oracle: the ceiling.
        energy_fixed: The same for the best K experts for all tokens, in hindsight: what no routing would keep.
        energy_random: K / E: the same, and the overlap, of a random choice.
    """

    mode: str
    tokens: int
    heldout: int
    ridge: float
    iterations: int
    agreement: float
    agreement_oracle: float
    original_oracle: float
    energy: float
    energy_original: float
    energy_oracle: float
    energy_fixed: float
    energy_random: float

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


@torch.no_grad()
def fit_linear_router(
    plan: LayerPlan, weights: FFNWeights, inputs: SiteInputs, config: RouterFitConfig
) -> tuple[LayerPlan, RouterFit]:
    """Replace the plan's router by a linear one with uniform gate; experts and everything else stay.

    Computes in the dtype of the inputs (experts) and in float32 (routers).

    Args:
        plan: A routed plan.
        weights: The dense FFN that it splits.
        inputs: Calibration inputs of that FFN; the last ``config.holdout`` of them are held out.
        config: What to fit and how.

    Raises:
        InputError: the plan routes nothing, its experts have different widths, or there are fewer than two tokens.
    """
    if plan.router.kind == "static":
        raise InputError("a static plan has no router to fit", "choose a layout with routed experts")
    if plan.varied:  # more energy is what wider experts have
        raise InputError("experts of different widths have a router that counts their cost", "leave --router out")
    if inputs.tokens < 2:
        raise InputError(f"{inputs.tokens} calibration tokens cannot fit a router", "give more calibration text")
    held_tokens = min(inputs.tokens - 1, max(1, round(config.holdout * inputs.tokens)))
    fit, held = inputs.part(slice(-held_tokens)), inputs.part(slice(-held_tokens, None))

    weights = weights.to(inputs.x_TD.dtype)
    chosen_TE = original_sets(weights, plan, held)
    energy_TE = expert_energies(expert_networks(weights, plan), held)

    score = _score(config, held, energy_TE if config.mode == "oracle" else chosen_TE, plan.top_k)
    if plan.top_k == len(plan.experts):
        weight_ED, ridge, iterations = torch.zeros(len(plan.experts), weights.d_model + config.bias), 0.0, 0
    elif config.mode == "oracle":
        fit_energy_TE = expert_energies(expert_networks(weights, plan), fit)
        target_TE = solver.energy_targets(fit_energy_TE, config.targets)
        margin_TE = solver.energy_margins(fit_energy_TE, plan.top_k)
        weight_ED, ridge, iterations = _fit(config, fit, target_TE, margin_TE, plan.top_k, score)
    else:
        fit_TE = original_sets(weights, plan, fit)
        target_TE, margin_TE = solver.decision_targets(fit_TE), solver.decision_margins(fit_TE)
        weight_ED, ridge, iterations = _fit(config, fit, target_TE, margin_TE, plan.top_k, score)

    fitted_TE = solver.top_k_sets(_scores(held, weight_ED, config.bias), plan.top_k)
    report = _report(config.mode, plan.top_k, (fitted_TE, chosen_TE, energy_TE), (fit.tokens, ridge, iterations))
    router = Router("linear", _router_tensors(weight_ED, config.bias))
    return replace(plan, router=router, gate="uniform", selection_bias=None, gate_scale=None), report


def expert_networks(weights: FFNWeights, plan: LayerPlan) -> Iterator[FFNWeights]:
    """Every routed expert as it will be written (readout, fade and scales applied), without the output bias.

    One after the other: as copies, the experts of a union may be many times the FFN.
    """
    tensors = pack(weights, plan)
    packed = FFNWeights(
        activation=weights.activation,
        learned=weights.learned,
        **{field: tensors[name] for field, name in TENSOR_NAMES.items() if name in tensors},
    )
    if plan.union:
        rows = [row_U.nonzero().flatten() + len(plan.shared) for row_U in plan.membership]
    else:
        rows = torch.arange(len(plan.shared), packed.d_ff).split([len(expert) for expert in plan.experts])
    for row in rows:
        yield packed.take(row.to(weights.up_FD.device))


def expert_energies(networks: Iterable[FFNWeights], inputs: SiteInputs) -> Tensor:
    """Output energy |E_j(x)|^2 of every expert for every token, float32 [T, E]."""

    def energy(network: FFNWeights) -> Tensor:
        outputs = (network(x_TD) for x_TD in inputs.batches(_BATCH, network.up_FD.dtype))
        return torch.cat([y_TD.float().square().sum(dim=1) for y_TD in outputs])

    return torch.stack([energy(network) for network in networks], dim=1)


def original_sets(weights: FFNWeights, plan: LayerPlan, inputs: SiteInputs) -> Tensor:
    """The experts that the plan's own router chooses, 0/1 float32 [T, E]."""
    ffn = build_ffn(weights, plan)
    batches = []
    for x_TD in inputs.batches(_BATCH):
        index_TK, _ = ffn.route(x_TD)
        empty_TE = torch.zeros(len(x_TD), len(plan.experts), device=x_TD.device)
        batches.append(empty_TE.scatter_(1, index_TK, 1.0))
    return torch.cat(batches)


def _fit(
    config: RouterFitConfig,
    inputs: SiteInputs,
    target_TE: Tensor,
    margin_TE: Tensor,
    k: int,
    score: solver.Score,
) -> tuple[Tensor, float, int]:
    """Ridge, then refinement: (weight_ED, ridge, iterations); with a bias, D has a last column for it."""

    def pairs(values_TE: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(_router_inputs(inputs, config.bias), values_TE.split(_BATCH), strict=True)

    statistics = solver.RidgeStatistics.collect(pairs(target_TE))
    weight_ED, ridge, _ = solver.choose_ridge(statistics, config.ridge, score)
    steps = config.resolved_steps()
    weight_ED, iterations = solver.refine_logistic(weight_ED, lambda: pairs(margin_TE), k, steps, score)
    return weight_ED, ridge, iterations


def _router_inputs(inputs: SiteInputs, bias: bool) -> Iterator[Tensor]:
    """What the router reads, float32 [t, D]; with a bias, a last column of ones."""
    for x_TD in inputs.batches(_BATCH, torch.float32):
        yield torch.nn.functional.pad(x_TD, (0, 1), value=1.0) if bias else x_TD


def _scores(inputs: SiteInputs, weight_ED: Tensor, bias: bool) -> Tensor:
    return torch.cat([x_TD @ weight_ED.T for x_TD in _router_inputs(inputs, bias)])


def _score(config: RouterFitConfig, held: SiteInputs, truth_TE: Tensor, k: int) -> Callable[[Tensor], float]:
    """What weights are worth on the held-out tokens: energy kept, or agreement with the sets ``truth_TE``."""
    measure = solver.energy_kept if config.mode == "oracle" else solver.agreement

    def score(weight_ED: Tensor) -> float:
        return measure(solver.top_k_sets(_scores(held, weight_ED, config.bias), k), truth_TE)

    return score


def _router_tensors(weight_ED: Tensor, bias: bool) -> dict[str, Tensor]:
    if not bias:
        return {"weight": weight_ED}
    return {"weight": weight_ED[:, :-1].contiguous(), "bias": weight_ED[:, -1].contiguous()}


def _report(mode: str, k: int, held: tuple[Tensor, Tensor, Tensor], fit: tuple[int, float, int]) -> RouterFit:
    """``held``: the fitted router's sets, the original's, the energies; ``fit``: tokens, ridge, iterations."""
    fitted_TE, chosen_TE, energy_TE = held
    tokens, ridge, iterations = fit
    oracle_TE = solver.top_k_sets(energy_TE, k)
    shares_E = solver.energy_shares(energy_TE).mean(dim=0)
    return RouterFit(
        mode=mode,
        tokens=tokens,
        heldout=len(energy_TE),
        ridge=ridge,
        iterations=iterations,
        agreement=solver.agreement(fitted_TE, chosen_TE),
        agreement_oracle=solver.agreement(fitted_TE, oracle_TE),
        original_oracle=solver.agreement(chosen_TE, oracle_TE),
        energy=solver.energy_kept(fitted_TE, energy_TE),
        energy_original=solver.energy_kept(chosen_TE, energy_TE),
        energy_oracle=solver.energy_kept(oracle_TE, energy_TE),
        energy_fixed=float(shares_E.topk(k).values.sum()),
        energy_random=k / energy_TE.shape[1],
    )
