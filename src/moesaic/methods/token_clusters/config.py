"""Options of token clusters. No torch here."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from moesaic.errors import InputError
from moesaic.methods.base import MethodConfig

MIN_TOKENS_PER_NEURON = 1.0  # experts of an existing MoE that got less stay whole


class Config(MethodConfig):
    """Options of token clusters."""

    active: float = Field(default=0.75, gt=0, le=1, description="Fraction of the neurons that one token uses.")
    experts: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Experts (E), one per token. 1: no routing, static pruning with the same refit.",
    )
    max_params: float | None = Field(
        default=None,
        gt=0,
        description="Most neurons stored, as a multiple of the dense FFN's: the experts then share as many neurons as "
        "that takes. Null: experts share nothing and store experts x active.",
    )
    rounds: int = Field(default=15, ge=1, description="Most rounds of the alternation between experts and tokens.")
    router_ridge: float = Field(
        default=1e-2,
        gt=0,
        allow_inf_nan=False,
        description="Ridge of the linear router, relative to the mean square of an input coordinate.",
    )
    refit: Literal["none", "global", "expert"] = Field(
        default="expert",
        description="Least squares for the down projection. none: as it was. global: one for all experts. expert: "
        "from there, each expert its own.",
    )
    global_ridge: float = Field(
        default=0.1,
        gt=0,
        allow_inf_nan=False,
        description="Shrinkage of the global refit to the dense projection, relative to the mean square activation.",
    )
    expert_ridge: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Shrinkage of an expert's refit to the global one, relative to its mean square activation.",
    )


def needs_calibration(config: Config) -> bool:
    """Whether this config reads calibration inputs: always."""
    return True


def widths(config: Config, d_ff: int) -> tuple[int, int]:
    """Neurons that one token uses, and how many of these are shared by all experts.

    Raises InputError when ``max_params`` cannot hold the experts.
    """
    width = max(1, round(config.active * d_ff))
    if config.experts == 1:
        return width, width
    if config.max_params is None:
        return width, 0
    budget = math.floor(config.max_params * d_ff)
    if budget < width:
        raise InputError(
            f"max_params {config.max_params:g} is less than the {config.active:g} of the neurons that one token uses",
            "raise max_params or lower active",
        )
    shared = max(0, math.ceil((config.experts * width - budget) / (config.experts - 1)))
    if shared >= width:
        raise InputError(
            f"max_params {config.max_params:g} leaves {config.experts} experts no neuron of their own",
            "raise max_params, or choose fewer experts",
        )
    return width, shared


def check(config: Config, d_ff: int) -> None:
    """Raises InputError when an FFN of ``d_ff`` neurons cannot be split this way."""
    widths(config, d_ff)
