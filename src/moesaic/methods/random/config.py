"""Options of the random control. No torch here."""

from __future__ import annotations

from pydantic import Field

from moesaic.blueprint.layout import Layout
from moesaic.blueprint.shape import Sizes, layout_sizes
from moesaic.methods.base import MethodConfig
from moesaic.methods.layout_option import LayoutText


class Config(MethodConfig):
    """Options of the random control."""

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


def needs_calibration(config: Config) -> bool:
    """Whether this config reads calibration inputs: never."""
    return False


def resolve_layout(config: Config, d_ff: int) -> Layout:
    """The layout as written, or the one of 16 units that is nearest to ``active``."""
    if config.active is None:
        return Layout.parse(config.layout)
    return Layout.from_active_fraction(config.active, min(16, d_ff))


def sizes(config: Config, d_ff: int) -> Sizes:
    """What ``config`` makes of an FFN of ``d_ff`` neurons. Raises InputError when its units are more than these."""
    return layout_sizes(resolve_layout(config, d_ff), d_ff)


def check(config: Config, d_ff: int) -> None:
    """Raises InputError when an FFN of ``d_ff`` neurons cannot be split this way."""
    sizes(config, d_ff)
