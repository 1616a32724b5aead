"""Options of LLaMA-MoE. No torch here."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from moesaic.blueprint.layout import Layout
from moesaic.blueprint.shape import FFNShape, layout_shape
from moesaic.methods.base import MethodConfig
from moesaic.methods.layout_option import LayoutText
from moesaic.options import study


class Config(MethodConfig):
    """Options of LLaMA-MoE."""

    min_tokens_per_neuron = 1.0  # experts of an existing MoE that got less for router=centroids stay whole

    layout: LayoutText = Field(
        default="S0A6E8",
        description="SxAyEz: y of z - x experts per token. The papers train S0A2E8, S0A2E16, S0A4E16 and S1A1E8.",
    )
    split: Literal["random", "contiguous"] = Field(
        default="random",
        description="random (Independent-Random, released v1 models) or contiguous (storage order, v2 Vanilla).",
    )
    gate: Literal["uniform", "softmax_topk"] = Field(
        default="uniform",
        description="Weight g_i of a chosen expert: all equal, or the softmax over the chosen scores (papers).",
    )
    score_scale: float | None = Field(
        default=None,
        gt=0,
        description="s, on the sum whose g_i add up to 1 (papers: E / k). Default k: all experts on equals dense.",
    )
    router: Literal["kaiming", "centroids"] = Field(
        default="kaiming",
        description="Rows of W: Kaiming-uniform noise, or centroids of the FFN inputs (v2 Residual; reads text).",
    )
    router_tokens: int = study(
        default=4096, ge=1, description="Calibration tokens to cluster for router=centroids, evenly spaced."
    )
    rounds: int = study(default=20, ge=1, description="Most k-means rounds for router=centroids (v2: 100).")

    def needs_calibration(self) -> bool:
        """Whether this config reads calibration inputs."""
        return self.router == "centroids"

    @property
    def own_layout(self) -> Layout | None:
        """See :class:`MethodConfig`."""
        return Layout.parse(self.layout)

    def sizes(self, d_ff: int) -> FFNShape:
        """The parts of an FFN of ``d_ff`` neurons. Raises InputError when it has fewer than the layout's units."""
        layout = Layout.parse(self.layout)
        return replace(layout_shape(layout, d_ff), gate=self.gate if layout.routed else "uniform")
