"""Options of the linear router fit. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from moesaic.solvers.limits import MIN_RIDGE


class RouterFitConfig(BaseModel):
    """How a linear router z = W x is fitted to a plan. Defaults were chosen on held-out text, see docs/routers.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["decisions", "oracle"] = Field(
        "oracle",
        description="What to predict. decisions: the sets that the plan's own router chooses. oracle: the k experts of "
        "largest output energy |E_j(x)|^2.",
    )
    targets: Literal["raw", "share", "amplitude"] = Field(
        "amplitude",
        description="Ridge targets in mode oracle. raw: e_j. share: e_j over the token's sum, so that tokens count "
        "alike. amplitude: the square root of the share.",
    )
    ridge: tuple[Annotated[float, Field(ge=MIN_RIDGE, allow_inf_nan=False)], ...] = Field(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        min_length=1,
        description="Ridge strengths to try, relative to the mean square of an input coordinate (lambda); the best on "
        "the held-out tokens is taken.",
    )
    steps: int | None = Field(
        None,
        ge=0,
        description="Most iterations of the logistic refinement after the ridge; 0 keeps the closed form. By default "
        "40 in mode oracle, 0 in mode decisions, where it gained nothing.",
    )
    holdout: float = Field(
        0.125,
        gt=0,
        lt=1,
        description="Share of the calibration tokens, the last ones, that choose ridge and iterations and give the "
        "report.",
    )
    bias: bool = Field(
        False,
        description="Fit b in z = W x + b too. Stock engines have no router bias; it gained nothing where we measured.",
    )

    def resolved_steps(self) -> int:
        """``steps``, or the default of the mode."""
        if self.steps is not None:
            return self.steps
        return 40 if self.mode == "oracle" else 0
