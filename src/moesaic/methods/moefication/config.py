"""Options of MoEfication. No torch here."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from moesaic.blueprint.layout import Layout
from moesaic.blueprint.shape import FFNShape, layout_shape
from moesaic.methods.base import MethodConfig
from moesaic.methods.layout_option import LayoutText
from moesaic.options import study

_PER_PAIR = 21
"""Operations of an assignment for each pair of neurons and each expert, as measured with 1,536 to 8,960 neurons."""


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
    matrix: Literal["auto", "gate", "up"] = study(
        default="auto",
        description="Rows to cluster (W_1): gate, the activation's argument, or up. auto: gate where there is one.",
    )
    rounds: int = study(default=20, ge=1, description="Most rounds of balanced assignment and centre update.")

    @property
    def own_layout(self) -> Layout | None:
        """See :class:`MethodConfig`."""
        return Layout.parse(self.layout) if self.expert_width is None else None

    def operations(self, d_ff: int, d_model: int, tokens: int) -> float:
        """See :class:`MethodConfig`: rounds of balanced assignment, whose time grows as the square of the neurons."""
        return _PER_PAIR * self.rounds * len(self.sizes(d_ff).own) * d_ff**2

    def sizes(self, d_ff: int) -> FFNShape:
        """The parts of an FFN of ``d_ff`` neurons. Raises InputError when it has fewer than the layout's units."""
        return replace(layout_shape(resolve_layout(self, d_ff), d_ff), normalised=True, router_bias=True)


def resolve_layout(config: Config, d_ff: int) -> Layout:
    """The layout as written, or stretched to ceil(d_ff / expert_width) units at the same fractions."""
    layout = Layout.parse(config.layout)
    if config.expert_width is None or layout.routed == 0:
        return layout
    units = -(-d_ff // config.expert_width)
    shared = min(units - 1, round(units * layout.shared / layout.units))
    active = max(1, round((units - shared) * layout.active / layout.routed))
    return Layout(shared, active, units)
