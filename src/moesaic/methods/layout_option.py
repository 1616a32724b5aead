"""The ``layout`` option as every routed method and control reads it. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from moesaic.blueprint.layout import Layout

LayoutText = Annotated[str, AfterValidator(lambda text: str(Layout.parse(text)))]
"""A string in SxAyEz notation, checked when the config is built."""


def active_neurons(layout: Layout, d_ff: int) -> int:
    """Neurons one token uses under a layout: the shared ones and ``active`` experts of mean size, rounded."""
    routed = sum(layout.expert_sizes(d_ff)) * layout.active / max(1, layout.routed)
    return round(layout.shared_size(d_ff) + routed)
