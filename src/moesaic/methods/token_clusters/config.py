"""Options of token clusters. No torch here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from pydantic import Field

from moesaic.blueprint.shape import FFNShape
from moesaic.errors import InputError
from moesaic.methods.base import MethodConfig
from moesaic.options import study
from moesaic.solvers.limits import MIN_RIDGE

_OVERLAPPING = 16
_UNION = 128
_FREE_ROUNDS = 4
"""Rounds that experts of free widths take, about: they end when held-out tokens keep no more."""
_DISJOINT = range(48, 129)
"""Numbers of disjoint experts among which the default is the one that needs least padding; of equal ones that nearest
to the middle."""


class Config(MethodConfig):
    """Options of token clusters."""

    has_active = True
    min_tokens_per_neuron = 1.0  # experts of an existing MoE that got less stay whole

    active: float = Field(default=0.75, gt=0, le=1, description="Fraction of the neurons that one token uses.")
    split: Literal["overlapping", "union", "disjoint"] = Field(
        default="overlapping",
        description="overlapping: top-1 of experts that hold copies of neurons, so the model grows. union: the same, "
        "every neuron stored once; only in the moesaic architecture. disjoint: top-k of many small experts, every "
        "neuron stored once.",
    )
    experts: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Routed experts (E). Default: 16 if overlapping; 128 as a union; if disjoint that number from 48 "
        "to 128 whose sizes need least padding. 1: no routing, static pruning with refit.",
    )
    widths: Literal["free", "equal"] = Field(
        default="free",
        description="union: free: experts have as many neurons as pays for their tokens, and `active` is the mean over "
        "tokens. equal: each has `active`, as stock architectures need it.",
    )
    max_params: float | None = Field(
        default=2.5,
        gt=0,
        description="Most neurons stored, as a multiple of the dense FFN's; the router is not counted. overlapping: "
        "the experts share as many as that takes; null: they share none, and experts x active is stored. union: below "
        "1, the neurons of least energy are left out.",
    )
    align: int = Field(
        default=1,
        ge=1,
        description="overlapping: widths of experts are multiples of this, and so is what one token uses, rounded to "
        "the nearest. `--align` sets it.",
    )
    shared: float = Field(
        default=0.8, ge=0, lt=1, description="disjoint: fraction of the active neurons that every token uses."
    )
    token_weight: Literal["equal", "stream"] = study(
        default="stream",
        description="How much a calibration token counts. stream: by the size of its FFN output beside that of the "
        "residual stream it is added to; alike where a norm stands between them. equal: all alike.",
    )
    rounds: int = study(
        default=10, ge=1, description="Most rounds of the alternation between experts and tokens (or of k-means)."
    )
    router_ridge: float = study(
        default=1e-2,
        ge=MIN_RIDGE,
        allow_inf_nan=False,
        description="Ridge of the linear router, relative to the mean square of an input coordinate.",
    )
    router_steps: int = study(
        default=50,
        ge=0,
        description="overlapping and union: steps by which the router is refined for the energy that its choice keeps, "
        "twice; 0: ridge alone.",
    )
    refit: Literal["none", "global", "expert"] = Field(
        default="expert",
        description="Least squares for the down projection. none: as it was. global: one for all experts. expert: "
        "from there, each overlapping expert its own.",
    )
    global_ridge: float = study(
        default=0.1,
        ge=MIN_RIDGE,
        allow_inf_nan=False,
        description="Shrinkage of the global refit to the dense projection, relative to the mean square activation.",
    )
    expert_ridge: float = study(
        default=1.0,
        ge=MIN_RIDGE,
        allow_inf_nan=False,
        description="Shrinkage of an expert's refit to the global one, relative to its mean square activation.",
    )

    def sizes(self, d_ff: int) -> FFNShape:
        """What this config makes of an FFN of ``d_ff`` neurons. Raises InputError when the parts do not fit."""
        return replace(_parts(self, d_ff), rewritten=int(self.refit != "none"))

    def operations(self, d_ff: int, d_model: int, tokens: int) -> float:
        """See :class:`MethodConfig`: activations and outputs, rounds of the alternation, Gram matrix and its factor.

        The refits of experts are left out: their tokens are few.
        """
        experts = len(self.sizes(d_ff).own)
        # disjoint: k-means of D columns in place of rounds over the tokens; free widths end their rounds early
        rounds = min(self.rounds, _FREE_ROUNDS) if self.sizes(d_ff).varied else self.rounds
        per_round = 2 * tokens * experts * (d_ff + 2 * d_model) if self.split != "disjoint" else 0
        # two refinements, steps of 1,024 tokens, forward and backward (solvers/token_clusters, solvers/router_fit), in
        # products of 16 bits, which count half
        refined = 1024 * self.router_steps * 6 * d_model * experts if self.split != "disjoint" else 0
        few = min(tokens, d_ff)  # a refit is solved in the smaller of both numbers
        gram = 0 if self.refit == "none" else tokens * d_ff * few + few**3 / 3
        return 6 * tokens * d_model * d_ff + 1.5 * rounds * per_round + refined + gram

    def held(self, d_ff: int, tokens: int) -> float:
        """See :class:`MethodConfig`: activations, shares and what is made of them, what experts keep of tokens.

        With free widths, the shares of the tokens that set no price once more. Calibration in bfloat16 takes half of
        that. A Gram matrix, its factor and the products that are added to it; with fewer tokens than neurons the
        activations as they are used.
        """
        solved = 0 if self.refit == "none" else 3 * min(tokens, d_ff) * d_ff
        parts = self.sizes(d_ff)
        return tokens * ((4 if parts.varied else 3) * d_ff + 3 * len(parts.own)) + solved

    def needs_calibration(self) -> bool:
        """Whether this config reads calibration inputs: always."""
        return True


def _parts(config: Config, d_ff: int) -> FFNShape:
    active = max(1, round(config.active * d_ff))
    if config.experts is None and config.split == "disjoint":
        return _least_padded(config, d_ff, active)
    experts = config.experts or (_UNION if config.split == "union" else _OVERLAPPING)
    if experts == 1:
        return FFNShape(d_ff, active, (), 0)
    if config.split == "union":
        varied = config.widths == "free"
        return FFNShape(d_ff, 0, (active,) * experts, 1, union=_union(config, d_ff, active), varied=varied)
    if config.split == "disjoint":
        return _disjoint(config, d_ff, active, experts)
    if config.align > 1:
        return _aligned(config, d_ff, active, experts)
    if config.max_params is None:
        return FFNShape(d_ff, 0, (active,) * experts, 1)
    stored = math.floor(config.max_params * d_ff)
    own = min(active, (stored - active) // (experts - 1))
    if own < 1:
        raise InputError(
            f"max_params {config.max_params:g} leaves {experts} experts no neuron of their own at {config.active:g} "
            f"active of {d_ff} neurons",
            "raise max_params, choose fewer experts, or split=union or disjoint, which store every neuron once",
        )
    # Stock targets pad the shared part to a multiple of an expert's width: make the two fit.
    own = math.ceil(active / math.ceil(active / own))
    return FFNShape(d_ff, active - own, (own,) * experts, 1)


def _aligned(config: Config, d_ff: int, active: int, experts: int) -> FFNShape:
    """Experts of a multiple of ``align`` neurons, and a shared part that is a whole number of experts wide."""
    align = config.align
    if align > d_ff:
        raise InputError(f"{d_ff} neurons have no part of {align}", "align to fewer")
    active = align * max(1, min(round(active / align), d_ff // align))
    if config.max_params is None:
        return FFNShape(d_ff, 0, (active,) * experts, 1)
    stored = math.floor(config.max_params * d_ff)
    widths = (own for own in range(active, 0, -align) if active % own == 0)
    for own in widths:
        if active - own + experts * own <= stored:
            return FFNShape(d_ff, active - own, (own,) * experts, 1)
    raise InputError(
        f"{experts} experts of {align} neurons or a multiple, {active} active of {d_ff}, are more than max_params "
        f"{config.max_params:g}",
        "choose fewer experts, raise max_params, or align to 32, which is enough for q4_0 and q8_0",
    )


def _union(config: Config, d_ff: int, active: int) -> int:
    """Neurons that the experts choose from."""
    if config.max_params is None or config.max_params >= 1:
        return d_ff
    stored = math.floor(config.max_params * d_ff)
    if stored < active:
        raise InputError(
            f"max_params {config.max_params:g} stores {stored} of {d_ff} neurons, one token uses {active}",
            "raise max_params, or lower active",
        )
    return stored


def _least_padded(config: Config, d_ff: int, active: int) -> FFNShape:
    """The disjoint split of fewest stored neurons over the numbers of experts in ``_DISJOINT``."""
    found, refused = [], None
    middle = (_DISJOINT.start + _DISJOINT.stop - 1) / 2
    for experts in sorted(_DISJOINT, key=lambda experts: abs(experts - middle)):
        try:
            found.append(_disjoint(config, d_ff, active, experts))
        except InputError as error:
            refused = refused or error
    if not found:
        assert refused is not None
        raise refused
    return min(found, key=lambda parts: parts.neurons)


def _disjoint(config: Config, d_ff: int, active: int, experts: int) -> FFNShape:
    """S and K with S + K (F - S) / E = active, S near the wanted share of it."""
    if active == d_ff:
        return FFNShape(d_ff, d_ff, (), 0)
    wanted = config.shared * active
    top_k = min(experts - 1, active * experts // d_ff, round((active - wanted) * experts / (d_ff - wanted)))
    top_k = max(1, top_k)
    shared = round((active * experts - top_k * d_ff) / (experts - top_k))
    if shared < 0:
        raise InputError(
            f"one of {experts} disjoint experts has more than the {active} of {d_ff} neurons that one token uses",
            "choose more experts",
        )
    size, longer = divmod(d_ff - shared, experts)
    if size == 0:
        raise InputError(
            f"{experts} disjoint experts are more than the {d_ff - shared} of {d_ff} neurons that are routed",
            "choose fewer experts",
        )
    return FFNShape(d_ff, shared, (size + 1,) * longer + (size,) * (experts - longer), top_k)
