"""Options of MoEfication. No torch here."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from moesaic.blueprint.layout import Layout
from moesaic.blueprint.shape import Sizes, layout_sizes
from moesaic.methods.base import MethodConfig
from moesaic.methods.layout_option import LayoutText


class Config(MethodConfig):
    """Options of MoEfication."""

    layout: LayoutText = Field(
        default="S0A6E8",
        description="SxAyEz: y of z - x experts per token (k of E). Shared units, x > 0, are ours: the paper has none.",
    )
    expert_width: int | None = Field(
        default=None,
        ge=1,
        description="Neurons per expert (paper: 32). When given, E follows from it and layout only sets the fractions.",
    )
    matrix: Literal["auto", "gate", "up"] = Field(
        default="auto",
        description="Rows to cluster (W_1): gate, the activation's argument, or up. auto: gate where there is one.",
    )
    rounds: int = Field(default=20, ge=1, description="Most rounds of balanced assignment and centre update.")


def needs_calibration(config: Config) -> bool:
    """Whether this config reads calibration inputs: never."""
    return False


def sizes(config: Config, d_ff: int) -> Sizes:
    """What ``config`` makes of an FFN of ``d_ff`` neurons. Raises InputError when its units are more than these."""
    return replace(layout_sizes(resolve_layout(config, d_ff), d_ff), normalised=True)


def check(config: Config, d_ff: int) -> None:
    """Raises InputError when an FFN of ``d_ff`` neurons cannot be split this way."""
    sizes(config, d_ff)


def resolve_layout(config: Config, d_ff: int) -> Layout:
    """The layout as written, or stretched to ceil(d_ff / expert_width) units at the same fractions."""
    layout = Layout.parse(config.layout)
    if config.expert_width is None or layout.routed == 0:
        return layout
    units = -(-d_ff // config.expert_width)
    shared = min(units - 1, round(units * layout.shared / layout.units))
    active = max(1, round((units - shared) * layout.active / layout.routed))
    return Layout(shared, active, units)
