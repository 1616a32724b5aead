"""Options of neuron experts. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moesaic.blueprint.shape import FFNShape
from moesaic.errors import InputError
from moesaic.methods.base import MethodConfig
from moesaic.options import study
from moesaic.solvers.limits import MIN_RIDGE

RIDGES = (0.3, 1.0, 3.0)
"""Strengths of a refit to choose from; where nothing can be held out it is the second."""


_PER_CODE = 4e3
"""Products in whose time one weight of the router gets its code, of six grids, and is verified (a model of 7B)."""


class Config(MethodConfig):
    """Options of neuron experts."""

    has_active = True
    min_tokens_per_neuron = 1.0  # where text is read, experts of an existing MoE that got less stay whole

    active: float = Field(default=0.5, gt=0, le=1, description="Fraction of the neurons that one token uses.")
    weights: Literal["stored", "int8"] = Field(
        default="stored",
        description="stored: the FFN's matrices stay as they are, and the router is a copy beside them. int8: they are "
        "rounded to 8 bits, of which the high half of gate and up is the router; the model becomes smaller.",
    )
    bits: Literal[2, 3, 4] = Field(default=4, description="Bits of a weight of the router.")
    group: Literal[32, 64, 128] = study(
        default=64, description="Weights of the router that share a scale and an offset; smaller is more precise."
    )
    choice: Literal["top_k", "threshold"] = Field(
        default="top_k",
        description="top_k: every token uses as many neurons. threshold: those whose score reaches a bound, so that "
        "`active` is the mean over calibration text, in each layer.",
    )
    refit: bool = Field(
        default=False,
        description="Least squares for the down projection on calibration text, layer by layer: it makes up for "
        "neurons that are left out.",
    )
    ridge: float | None = study(
        default=None,
        ge=MIN_RIDGE,
        allow_inf_nan=False,
        description="Shrinkage of the refit to the dense projection, relative to the mean square activation. null: in "
        "each layer the one that errs least on tokens that were held out.",
    )

    @model_validator(mode="after")
    def _high_half(self) -> Config:
        if self.weights == "int8" and (self.bits, self.group) != (4, 64):
            raise ValueError("with weights=int8 the router is their high half: 4 bits in groups of 64")
        return self

    def sizes(self, d_ff: int) -> FFNShape:
        """Every neuron an expert. Raises InputError when none would be chosen."""
        chosen = round(self.active * d_ff)
        if chosen < 1:
            raise InputError(f"{self.active:g} of {d_ff} neurons leaves none", "raise active")
        singles, rewritten = (1,) * d_ff, int(self.refit)
        router = {"bits": self.bits, "group": self.group, "int8": self.weights == "int8"}
        return FFNShape(d_ff, 0, singles, chosen, "low_bit", rewritten=rewritten, **router)

    def needs_calibration(self) -> bool:
        """Whether this config reads calibration inputs: for a threshold, and for a refit."""
        return self.refit or self.choice == "threshold"

    def operations(self, d_ff: int, d_model: int, tokens: int) -> float:
        """See :class:`MethodConfig`: codes of the router; scores, activations and outputs; for a refit a Gram matrix,
        its factor for each strength of the ridge, and a solution."""
        codes = _PER_CODE * 2 * d_model * d_ff
        if not self.needs_calibration():
            return codes
        if not self.refit:
            return codes + 4 * tokens * d_model * d_ff
        factors = len(RIDGES) + 1 if self.ridge is None else 1
        solved = d_ff**2 * (tokens + factors * d_ff / 3 + 2 * d_model)
        return codes + 10 * tokens * d_model * d_ff + solved

    def held(self, d_ff: int, tokens: int) -> float:
        """See :class:`MethodConfig`: scores of all tokens and a copy for a threshold; for a refit a Gram matrix, its
        factor and a copy in float64, and what is held out to choose its ridge."""
        scores = 2 * tokens * d_ff if self.choice == "threshold" else 0
        held_out = tokens / 8 * d_ff if self.ridge is None else 0
        return max(scores, 6 * d_ff**2 + held_out if self.refit else 0)
