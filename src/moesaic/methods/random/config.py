"""Options of the random control. No torch here."""

from __future__ import annotations

from pydantic import Field

from moesaic.blueprint.layout import Layout
from moesaic.blueprint.shape import FFNShape, layout_shape
from moesaic.methods.base import MethodConfig
from moesaic.methods.layout_option import LayoutText


class Config(MethodConfig):
    """Options of the random control."""

    has_active = True

    layout: LayoutText = Field(
        default="S3A3E8",
        description="SxAyEz: x shared units, y active experts, z units; as the method it stands beside.",
    )
    active: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Active fraction (x + y) / z; overrides layout with the nearest layout of 16 units when given.",
    )

    @property
    def own_layout(self) -> Layout | None:
        """See :class:`MethodConfig`."""
        return Layout.parse(self.layout) if self.active is None else None

    def sizes(self, d_ff: int) -> FFNShape:
        """The parts of an FFN of ``d_ff`` neurons. Raises InputError when it has fewer than the layout's units."""
        return layout_shape(resolve_layout(self, d_ff), d_ff)


def resolve_layout(config: Config, d_ff: int) -> Layout:
    """The layout as written, or the one of 16 units that is nearest to ``active``."""
    if config.active is None:
        return Layout.parse(config.layout)
    return Layout.from_active_fraction(config.active, min(16, d_ff))
