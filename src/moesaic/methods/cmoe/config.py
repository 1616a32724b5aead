"""Options of CMoE. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moesaic.blueprint.layout import Layout
from moesaic.blueprint.shape import FFNShape, layout_shape
from moesaic.errors import InputError
from moesaic.methods.base import MethodConfig
from moesaic.methods.layout_option import LayoutText
from moesaic.options import study


class Config(MethodConfig):
    """Options of CMoE."""

    min_tokens_per_neuron = 4.0  # experts of an existing MoE that got less stay whole [OURS]

    layout: LayoutText = Field(
        default="S3A3E8",
        description="SxAyEz: x shared units, y of z - x routed experts per token (paper: x = N_s, y = N_k, z = N).",
    )
    markers_per_token: int = Field(default=10, ge=1, description="Neurons marked per token, the largest |h^| (K_a).")
    iterations: int = study(
        default=1,
        ge=1,
        description="Rounds of balanced assignment; before each but the first the centroids become the means of their "
        "clusters. Ends early when nothing moves.",
    )
    balance_steps: int = Field(
        default=0,
        ge=0,
        description="Updates of the selection bias b on calibration batches before use; 0 leaves b at zero. Ours: the "
        "paper balances only while training.",
    )
    balance_rate: float = study(
        default=1e-3,
        gt=0,
        allow_inf_nan=False,
        description="First step of the selection bias (gamma); it shrinks to 0.",
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = study(
        default="auto",
        description="Precision of the first pass over the scores; near-ties are scored again in full precision, so it "
        "changes the speed, not the result. auto: bfloat16 where the CPU has it in hardware.",
    )

    def needs_calibration(self) -> bool:
        """Whether this config reads calibration inputs: only without routed experts there is nothing to decide."""
        return Layout.parse(self.layout).routed > 0

    @property
    def own_layout(self) -> Layout | None:
        """See :class:`MethodConfig`."""
        return Layout.parse(self.layout)

    def sizes(self, d_ff: int) -> FFNShape:
        """The parts of an FFN of ``d_ff`` neurons. Raises InputError when it has fewer than the layout's units."""
        return layout_shape(Layout.parse(self.layout), d_ff, "gated")

    def check(self, d_ff: int) -> None:
        """Raises InputError when an FFN of ``d_ff`` neurons cannot be split this way."""
        self.sizes(d_ff)
        if self.markers_per_token > d_ff:
            raise InputError(
                f"markers_per_token {self.markers_per_token} is more than the FFN's {d_ff} neurons",
                "mark fewer, e.g. 10",
            )
