"""Options of MLPMoE. No torch here."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from moesaic.blueprint.shape import FFNShape
from moesaic.errors import InputError
from moesaic.methods.base import MethodConfig
from moesaic.options import study
from moesaic.solvers.fade import Schedule, fade_fractions


class Config(MethodConfig):
    """Options of MLPMoE. The defaults change nothing: N slices, all on."""

    branches: int = Field(default=32, ge=1, description="N, the number of branches.")
    order: Literal["contiguous", "strided", "norm-sorted"] = Field(
        default="contiguous",
        description="Which neurons make a branch: storage order, neuron j to branch j mod N, or falling weight norm.",
    )
    strict: bool = study(default=False, description="Refuse when N does not divide the FFN width f.")
    fade_max: float = Field(
        default=0.0, ge=0, lt=1, description="s_max of Fractal Fade; 0.4 (linear) removes about 20 %."
    )
    fade_min: float = study(
        default=0.0, ge=0, lt=1, description="s_min of Fractal Fade, the sparsity of the first branch."
    )
    fade_schedule: Schedule = Field(
        default="linear",
        description="s_i over the branches: linear, power (exponent gamma) or dyadic (doubling groups).",
    )
    fade_gamma: float = study(default=2.0, gt=0, description="gamma, the exponent of the power schedule.")
    fade_unit: Literal["weight", "neuron"] = Field(
        default="weight",
        description="What Fractal Fade removes: single weights (zeros) or whole neurons (smaller shapes).",
    )
    fade_scope: Literal["matrix", "row", "branch"] = study(
        default="matrix",
        description="Weights that compete in unit=weight: a matrix slice, each row of it, or the branch.",
    )
    keep: int | None = Field(
        default=None, ge=1, description="K, the branches that Compensated Pruning keeps; default all."
    )
    prune_which: Literal["last", "low_energy", "strided", "random"] = Field(
        default="low_energy",
        description="What to drop: the last, low energy e_i, all but every N/K-th (strided), or random branches.",
    )
    prune_factor: Literal["sqrt", "energy", "ratio", "none", "per_channel", "oracle"] = Field(
        default="sqrt",
        description="c: sqrt(N/K), energy sqrt(sum e / sum kept e), ratio N/K, none 1, per_channel c_j, or oracle "
        "(least squares on calibration inputs).",
    )
    prune_clip: tuple[float, float] = study(
        default=(1.0, 4.0), description="Lowest and highest c; oracle is not clipped."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.fade_min > self.fade_max:
            raise InputError(
                f"fade_min {self.fade_min} is larger than fade_max {self.fade_max}", "fade_min <= fade_max"
            )
        if self.keep is not None and self.keep > self.branches:
            raise InputError(
                f"keep {self.keep} of {self.branches} branches", "keep at most as many branches as there are"
            )
        if not 0 < self.prune_clip[0] <= self.prune_clip[1]:
            raise InputError(f"prune_clip {self.prune_clip} is no range of positive factors", "write e.g. 1,4")
        return self

    def needs_calibration(self) -> bool:
        """Whether this config reads calibration inputs: only the oracle factor does."""
        return prunes(self) and self.prune_factor == "oracle"

    def sizes(self, d_ff: int) -> FFNShape:
        """Branches that are kept, all always on. Branches differ by one neuron at most; what is over counts as shared.

        Where neurons fade too, the widths kept are not known before: those of every N/K-th branch stand for them.
        """
        branches, count = self.branches, self.keep or self.branches
        if self.fade_unit == "neuron" and self.fade_max > 0:
            fractions = fade_fractions(self.fade_schedule, branches, self.fade_min, self.fade_max, self.fade_gamma)
            width, longer = divmod(d_ff, branches)
            slices = [width + (i < longer) for i in range(branches)]
            widths = [size - math.floor(s * size) for s, size in zip(fractions, slices, strict=True)]
            return FFNShape(d_ff, 0, tuple(widths[i * branches // count] for i in range(count)), count, "static")
        kept = d_ff * count // branches
        return FFNShape(d_ff, kept % count, (kept // count,) * count, count, "static")

    def check(self, d_ff: int) -> None:
        """Raises InputError when an FFN of ``d_ff`` neurons cannot be sliced this way."""
        if self.branches > d_ff:
            raise InputError(f"{self.branches} branches but the FFN has only {d_ff} neurons", "use fewer branches")
        if self.strict and d_ff % self.branches:
            raise InputError(
                f"{self.branches} branches do not divide the {d_ff} neurons of the FFN",
                "leave strict off for uneven slices",
            )


def prunes(config: Config) -> bool:
    """Whether branches are dropped at all."""
    return config.keep is not None and config.keep < config.branches
