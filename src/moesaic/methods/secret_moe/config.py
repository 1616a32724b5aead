"""Options of Secret MoE. No torch here."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from moesaic.blueprint.shape import FFNShape
from moesaic.errors import InputError
from moesaic.methods.base import MethodConfig
from moesaic.methods.token_clusters.config import Config as Clusters
from moesaic.options import study


class Config(MethodConfig):
    """Options of Secret MoE."""

    has_active = True
    min_tokens_per_neuron = 4.0  # experts of an existing MoE that got less stay whole

    active: float = Field(default=0.75, gt=0, le=1, description="Fraction of the neurons that one token uses.")
    split: Literal["disjoint", "overlapping"] = Field(
        default="disjoint",
        description="What training starts from. disjoint: top-k of small experts, the model does not grow. "
        "overlapping: top-1 of 16 token clusters that hold copies of neurons, which then go their own ways.",
    )
    shared: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="disjoint: fraction of the active neurons that every token uses (h_s / A); the paper's students "
        "have a half. 1: no routing, static pruning with the same training, the control.",
    )
    width: int = Field(default=32, ge=1, description="disjoint: neurons per expert (w); the paper's are of 1.")
    max_params: float = Field(
        default=2.5, gt=0, description="overlapping: most neurons stored, as a multiple of the dense FFN's."
    )
    rank: int | None = Field(
        default=16, ge=1, description="Rank of the router (p), at most the number of experts; null: a full one."
    )
    spread: float = study(
        default=0.25,
        gt=0,
        allow_inf_nan=False,
        description="Standard deviation of the router's scores at the start: small, so that weights start near 1.",
    )
    steps: int = Field(default=400, ge=0, description="Steps of Adam per FFN; 0 only rebuilds the start.")
    batch: int = Field(default=512, ge=1, description="Tokens per step.")
    rate: float = study(
        default=1e-3, gt=0, allow_inf_nan=False, description="Peak learning rate of neurons, cosine to zero."
    )
    router_rate: float = study(
        default=1e-3,
        ge=0,
        allow_inf_nan=False,
        description="Peak learning rate of the router; 0 leaves it as it is. overlapping: without effect, as a single "
        "chosen expert has weight 1 whatever its score.",
    )
    held_out: float = study(
        default=0.1, gt=0, le=0.5, description="Share of the tokens on which the best state is chosen."
    )

    def start(self, d_ff: int) -> Clusters:
        """The split of an FFN of ``d_ff`` neurons that training starts from: token clusters."""
        if self.shared == 1 or round(self.active * d_ff) >= d_ff:
            return Clusters(active=self.active, experts=1, refit="global")
        if self.split == "overlapping":
            return Clusters(active=self.active, max_params=self.max_params)
        active = max(1, round(self.active * d_ff))
        experts = max(2, round((d_ff - self.shared * active) / self.width))
        if experts > 1024:
            raise InputError(f"{experts} experts of {self.width} neurons", "choose wider experts, at most 1024")
        return Clusters(active=self.active, split="disjoint", experts=experts, shared=self.shared, refit="global")

    def needs_calibration(self) -> bool:
        """Whether this config reads calibration inputs: always."""
        return True

    def sizes(self, d_ff: int) -> FFNShape:
        """Neurons of the parts. Raises InputError when they do not fit."""
        start = replace(self.start(d_ff).sizes(d_ff), rewritten=3)
        if not start.own:
            return start
        low_rank = self.rank is not None and self.rank < start.experts
        return replace(start, router="low_rank" if low_rank else "linear", gate="softmax_topk")

    def operations(self, d_ff: int, d_model: int, tokens: int) -> float:
        """What deciding one gated FFN takes: its start, then steps of three passes."""
        start = self.start(d_ff).operations(d_ff, d_model, tokens)
        return start + 3 * 6 * self.steps * self.batch * d_model * d_ff * self.active

    def held(self, d_ff: int, tokens: int) -> float:
        """fp32 numbers at the peak of deciding one FFN: what its start holds."""
        return self.start(d_ff).held(d_ff, tokens)
