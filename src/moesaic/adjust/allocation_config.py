"""Options of the allocation over layers: which layers stay dense, and where that is measured. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from moesaic.errors import InputError
from moesaic.solvers.limits import AllocationMode as Mode
from moesaic.targets import AUTO, TARGETS

MODES = ("auto", "leading", "any", "widths")
_FREEDOM: tuple[Mode, ...] = ("leading", "any", "widths")


class AllocationConfig(BaseModel):
    """How the active neurons are shared out over the layers, at the same total [OURS]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["auto", "leading", "any", "widths"] = Field(
        default="auto",
        description="leading: some of the first layers stay dense, the others are equal. any: so with any layers. "
        "widths: every layer has a number of active neurons of its own (target moesaic). auto: leading, which did best "
        "where we measured.",
    )
    tokens: int = Field(
        default=2048,
        ge=16,
        description="Calibration tokens on which the layers' sensitivity is measured, from the second half of the "
        "text; as many of the first half choose the neurons.",
    )
    fractions: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = Field(
        default=None,
        min_length=1,
        max_length=3,
        description="Active fractions at which each layer is measured. By default the method's `active` and two thirds "
        "of it.",
    )

    def fractions_for(self, active: float) -> tuple[float, ...]:
        """``fractions``, or the default for a model of which ``active`` is used."""
        chosen = (active, 2 * active / 3) if self.fractions is None else self.fractions
        return tuple(sorted({round(fraction, 4) for fraction in chosen}, reverse=True))

    def mode_for(self, target: str, others: Sequence[str] = ()) -> Mode:
        """``mode``, resolved.

        Raises InputError when the target cannot hold it; the hint names ``others``, which can hold the model so.
        """
        freest = "any" if target == AUTO else TARGETS[target].freedom
        if freest == "none":
            raise InputError(
                f"target {target} has the same FFN in every layer: there is nothing to share out",
                f"use --target {' or '.join(others)}" if others else "leave allocation out",
            )
        mode = "leading" if self.mode == "auto" else self.mode
        if mode == "widths" and freest != "widths":
            raise InputError(f"layers of different widths, and target {target}", "only target moesaic holds them")
        if _FREEDOM.index(mode) > _FREEDOM.index(freest):
            raise InputError(f"target {target} takes dense layers at the start only", "choose mode leading")
        return mode
