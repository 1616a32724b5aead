"""MLPMoE (Novikov, arXiv 2511.21089): slice the dense FFN into N branches that are always on, and add them up.

Equations, for any partition I_1..I_N of the neurons (exact, since act and * are elementwise; b_d counts once):

    E_i(x) = W_d[:, I_i] (act(W_g[I_i] x + b_g[I_i]) * (W_u[I_i] x + b_u[I_i])),    FFN(x) = sum_i E_i(x) + b_d

No router, no data, no training. Two ways to remove something, alone or together:

* Fractal Fade: branch i loses the fraction s_i of its weights (smallest magnitudes) or of its neurons (lowest scores);
* Compensated Pruning: FFN'(x) = c sum_{i in K} E_i(x) + b_d, with c folded into W_d.

Only the abstract of the paper was at hand: slicing defaults and both removals are our readings [OURS]. Limits and
choices: docs/methods/mlpmoe.md.

Axes: T tokens, D model width, F neurons, N branches, K kept branches, M neurons of a branch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moesaic.blueprint import LayerPlan, WeightFade
from moesaic.errors import InputError
from moesaic.methods.base import MethodConfig, SiteInputs
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.compensation import (
    Factor,
    Which,
    channel_compensation,
    compensation,
    kept_branches,
    least_squares_factor,
)
from moesaic.solvers.energy import branch_energies, neuron_norms, neuron_scores, square_norms
from moesaic.solvers.fade import Schedule, fade_fractions
from moesaic.solvers.magnitude import Scope, fade_branches

NEEDS_CALIBRATION = False


class Config(MethodConfig):
    """Options of MLPMoE. The defaults change nothing: N slices, all on."""

    branches: int = Field(default=32, ge=1, description="N, the number of branches.")
    order: Literal["contiguous", "strided", "norm-sorted"] = Field(
        default="contiguous",
        description="Which neurons make a branch: storage order, neuron j to branch j mod N, or falling weight norm.",
    )
    strict: bool = Field(default=False, description="Refuse when N does not divide the FFN width f.")
    fade_max: float = Field(
        default=0.0, ge=0, lt=1, description="s_max of Fractal Fade; 0.4 (linear) removes about 20 %."
    )
    fade_min: float = Field(
        default=0.0, ge=0, lt=1, description="s_min of Fractal Fade, the sparsity of the first branch."
    )
    fade_schedule: Schedule = Field(
        default="linear",
        description="s_i over the branches: linear, power (exponent gamma) or dyadic (doubling groups).",
    )
    fade_gamma: float = Field(default=2.0, gt=0, description="gamma, the exponent of the power schedule.")
    fade_unit: Literal["weight", "neuron"] = Field(
        default="weight",
        description="What Fractal Fade removes: single weights (zeros) or whole neurons (smaller shapes).",
    )
    fade_scope: Scope = Field(
        default="matrix",
        description="Weights that compete in unit=weight: a matrix slice, each row of it, or the branch.",
    )
    keep: int | None = Field(
        default=None, ge=1, description="K, the branches that Compensated Pruning keeps; default all."
    )
    prune_which: Which = Field(
        default="low_energy",
        description="What to drop: the last, low energy e_i, all but every N/K-th (strided), or random branches.",
    )
    prune_factor: Factor | Literal["oracle"] = Field(
        default="sqrt",
        description="c: sqrt(N/K), energy sqrt(sum e / sum kept e), ratio N/K, none 1, per_channel c_j, or oracle "
        "(least squares on calibration inputs).",
    )
    prune_clip: tuple[float, float] = Field(
        default=(1.0, 4.0), description="Lowest and highest c; oracle is not clipped."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.fade_min > self.fade_max:
            raise InputError(
                f"fade_min {self.fade_min} is larger than fade_max {self.fade_max}", "fade_min <= fade_max"
            )
        if self.keep is not None and self.keep > self.branches:
            raise InputError(
                f"keep {self.keep} of {self.branches} branches", "keep at most as many branches as there are"
            )
        if not 0 < self.prune_clip[0] <= self.prune_clip[1]:
            raise InputError(f"prune_clip {self.prune_clip} is no range of positive factors", "write e.g. 1,4")
        return self


def needs_calibration(config: Config) -> bool:
    """Whether this config reads calibration inputs: only the oracle factor does."""
    return _prunes(config) and config.prune_factor == "oracle"


def check(config: Config, d_ff: int) -> None:
    """Raises InputError when an FFN of ``d_ff`` neurons cannot be sliced this way."""
    if config.branches > d_ff:
        raise InputError(f"{config.branches} branches but the FFN has only {d_ff} neurons", "use fewer branches")
    if config.strict and d_ff % config.branches:
        raise InputError(
            f"{config.branches} branches do not divide the {d_ff} neurons of the FFN",
            "leave strict off for uneven slices",
        )


def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Config, seed: int) -> LayerPlan:
    """Slice, fade, prune; see :class:`moesaic.methods.base.MethodModule`. ``seed`` matters for prune_which=random only.

    Fade and prune together: s_i belongs to branch i of all N; which branches go and c are decided on the dense slices.
    """
    check(config, weights.d_ff)
    norms_F = neuron_norms(weights.gate_FD, weights.up_FD, weights.down_DF) if _reads_norms(config) else None
    slices = _slices(weights.d_ff, config, norms_F)
    experts, fade = slices, None
    if config.fade_max > 0:
        fractions = fade_fractions(
            config.fade_schedule, config.branches, config.fade_min, config.fade_max, config.fade_gamma
        )
        if config.fade_unit == "weight":
            fade = WeightFade(fractions, config.fade_scope)
        else:
            assert norms_F is not None
            experts = _fade_neurons(slices, fractions, neuron_scores(*norms_F))
    plan = _static_plan(weights.d_ff, experts, fade)
    return _prune(weights, inputs, plan, slices, norms_F, config, seed) if _prunes(config) else plan


@dataclass(frozen=True)
class Accounting:
    """What a plan leaves of one FFN. Parameters are the entries of gate, up and down; biases are not counted.

    Attributes:
        branches: Number of branches.
        widths: Neurons of each branch.
        parameters: Entries of the dense matrices.
        nonzeros: Entries that are left and not zero.
        energies: Data-free energy e_i of each branch (before weight fade and c).
        scales: c of each branch; for per-channel factors the mean over channels.
    """

    branches: int
    widths: tuple[int, ...]
    parameters: int
    nonzeros: int
    energies: tuple[float, ...]
    scales: tuple[float, ...]

    @property
    def removed_fraction(self) -> float:
        """Zeros / FFN parameters; removed neurons and branches count as zeros."""
        return 1 - self.nonzeros / self.parameters


def describe(plan: LayerPlan, weights: FFNWeights) -> Accounting:
    """Count what ``plan``, made for ``weights``, keeps and removes."""
    packed = _pack(weights, plan)
    matrices = (packed.gate_FD, packed.up_FD, packed.down_DF)
    dense = (weights.gate_FD, weights.up_FD, weights.down_DF)
    norms_F = neuron_norms(*dense)
    scales = torch.ones(len(plan.experts)) if plan.expert_scale is None else plan.expert_scale
    return Accounting(
        branches=len(plan.experts),
        widths=tuple(len(expert) for expert in plan.experts),
        parameters=sum(m.numel() for m in dense if m is not None),
        nonzeros=sum(int(torch.count_nonzero(m)) for m in matrices if m is not None),
        energies=tuple(branch_energies(*norms_F, plan.experts).tolist()),
        scales=tuple((scales if scales.dim() == 1 else scales.mean(dim=1)).tolist()),
    )


def _prunes(config: Config) -> bool:
    return config.keep is not None and config.keep < config.branches


def _reads_norms(config: Config) -> bool:
    fades_neurons = config.fade_max > 0 and config.fade_unit == "neuron"
    return config.order == "norm-sorted" or fades_neurons or _prunes(config)


def _slices(d_ff: int, config: Config, norms_F: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    """The partition: N index sets; where N does not divide f, the first f mod N are one longer."""
    if config.order == "strided":
        return tuple(torch.arange(start, d_ff, config.branches) for start in range(config.branches))
    order_F = torch.arange(d_ff)
    if config.order == "norm-sorted":
        assert norms_F is not None
        order_F = torch.argsort(neuron_scores(*norms_F), descending=True, stable=True)
    size, longer = divmod(d_ff, config.branches)
    return order_F.split([size + 1] * longer + [size] * (config.branches - longer))


def _static_plan(d_ff: int, experts: tuple[Tensor, ...], fade: WeightFade | None) -> LayerPlan:
    return LayerPlan(d_ff=d_ff, shared=torch.zeros(0, dtype=torch.long), experts=experts, top_k=len(experts), fade=fade)


def _fade_neurons(slices: tuple[Tensor, ...], fractions: tuple[float, ...], score_F: Tensor) -> tuple[Tensor, ...]:
    """Each branch without its floor(s_i |I_i|) neurons of lowest score (of equal scores the earlier go), order kept."""
    experts = []
    for index_M, fraction in zip(slices, fractions, strict=True):
        removed = math.floor(fraction * len(index_M))
        kept = torch.argsort(score_F[index_M], stable=True)[removed:].sort().values
        experts.append(index_M[kept])
    return tuple(experts)


def _prune(
    weights: FFNWeights,
    inputs: SiteInputs | None,
    plan: LayerPlan,
    slices: tuple[Tensor, ...],
    norms_F: tuple[Tensor, Tensor] | None,
    config: Config,
    seed: int,
) -> LayerPlan:
    """Keep K branches of ``plan`` and fold c into them; energies are those of the dense ``slices``."""
    assert norms_F is not None
    assert config.keep is not None
    energies_N = branch_energies(*norms_F, slices)
    kept = kept_branches(config.prune_which, energies_N, config.keep, torch.Generator().manual_seed(seed))
    fade = plan.fade
    if fade is not None:
        fade = replace(fade, fractions=tuple(fade.fractions[i] for i in kept))
    pruned = _static_plan(plan.d_ff, tuple(plan.experts[i] for i in kept), fade)
    if config.prune_factor == "per_channel":
        kept_D = square_norms(weights.down_DF[:, torch.cat([slices[i] for i in kept])])
        c_D = channel_compensation(square_norms(weights.down_DF), kept_D, config.prune_clip)
        return replace(pruned, expert_scale=c_D.float().repeat(config.keep, 1))
    if config.prune_factor == "oracle":
        c = _oracle_factor(weights, inputs, pruned)
    else:
        c = compensation(config.prune_factor, energies_N, kept, config.prune_clip)
    return pruned if c == 1.0 else replace(pruned, expert_scale=torch.full((config.keep,), c))


def _oracle_factor(weights: FFNWeights, inputs: SiteInputs | None, plan: LayerPlan) -> float:
    if inputs is None:
        raise InputError(
            "prune_factor=oracle needs calibration inputs", "give calibration text, or use prune_factor=sqrt"
        )
    # b_d is in both outputs unscaled, so it is left out of the fit
    dense = replace(weights, down_bias_D=None).to(torch.float32)
    pruned = _pack(weights, plan).to(torch.float32)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for x_TD in inputs.batches(dtype=torch.float32):
            yield dense(x_TD), pruned(x_TD)

    return least_squares_factor(pairs())


def _pack(weights: FFNWeights, plan: LayerPlan) -> FFNWeights:
    """The branches of a plan side by side as one FFN, faded, without c and without b_d."""
    packed = weights.take(plan.packed)
    if plan.fade is None:
        return packed
    widths = [len(expert) for expert in plan.experts]
    gate, up, down = fade_branches(
        packed.gate_FD, packed.up_FD, packed.down_DF, widths, plan.fade.fractions, plan.fade.scope
    )
    return replace(packed, gate_FD=gate, up_FD=up, down_DF=down)
