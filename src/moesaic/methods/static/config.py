"""Options of the static control. No torch here."""

from __future__ import annotations

from pydantic import Field

from moesaic.blueprint.layout import Layout
from moesaic.blueprint.shape import FFNShape
from moesaic.methods.base import MethodConfig
from moesaic.methods.layout_option import LayoutText, active_neurons


class Config(MethodConfig):
    """Options of the static control."""

    has_active = True
    min_tokens_per_neuron = 4.0  # experts of an existing MoE that got less stay whole, as with CMoE

    layout: LayoutText = Field(
        default="S3A3E8",
        description="SxAyEz of the method it stands beside: only its active fraction (x + y) / z counts here.",
    )
    active: float | None = Field(
        default=None, gt=0, le=1, description="Fraction of the neurons to keep; overrides layout when given."
    )

    def needs_calibration(self) -> bool:
        """Whether this config reads calibration inputs: always."""
        return True

    @property
    def own_layout(self) -> Layout | None:
        """See :class:`MethodConfig`."""
        return Layout.parse(self.layout) if self.active is None else None

    def sizes(self, d_ff: int) -> FFNShape:
        """The neurons that stay, as a shared part alone."""
        return FFNShape(d_ff, kept_neurons(self, d_ff))


def kept_neurons(config: Config, d_ff: int) -> int:
    """How many of ``d_ff`` neurons stay."""
    if config.active is None:
        return active_neurons(Layout.parse(config.layout), d_ff)
    return max(1, round(config.active * d_ff))
