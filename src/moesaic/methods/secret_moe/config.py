"""Options of Secret MoE. No torch here."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from moesaic.blueprint.shape import Sizes
from moesaic.errors import InputError
from moesaic.methods.base import MethodConfig
from moesaic.methods.token_clusters import config as clusters

MIN_TOKENS_PER_NEURON = 4.0  # experts of an existing MoE that got less stay whole


class Config(MethodConfig):
    """Options of Secret MoE."""

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
    spread: float = Field(
        default=0.25,
        gt=0,
        allow_inf_nan=False,
        description="Standard deviation of the router's scores at the start: small, so that weights start near 1.",
    )
    steps: int = Field(default=400, ge=0, description="Steps of Adam per FFN; 0 only rebuilds the start.")
    batch: int = Field(default=512, ge=1, description="Tokens per step.")
    rate: float = Field(
        default=1e-3, gt=0, allow_inf_nan=False, description="Peak learning rate of neurons, cosine to zero."
    )
    router_rate: float = Field(
        default=1e-3,
        ge=0,
        allow_inf_nan=False,
        description="Peak learning rate of the router; 0 leaves it as it is. overlapping: without effect, as a single "
        "chosen expert has weight 1 whatever its score.",
    )
    held_out: float = Field(
        default=0.1, gt=0, le=0.5, description="Share of the tokens on which the best state is chosen."
    )

    def start(self, d_ff: int) -> clusters.Config:
        """The split of an FFN of ``d_ff`` neurons that training starts from: token clusters."""
        if self.shared == 1 or round(self.active * d_ff) >= d_ff:
            return clusters.Config(active=self.active, experts=1, refit="global")
        if self.split == "overlapping":
            return clusters.Config(active=self.active, max_params=self.max_params)
        active = max(1, round(self.active * d_ff))
        experts = max(2, round((d_ff - self.shared * active) / self.width))
        if experts > 1024:
            raise InputError(f"{experts} experts of {self.width} neurons", "choose wider experts, at most 1024")
        return clusters.Config(
            active=self.active, split="disjoint", experts=experts, shared=self.shared, refit="global"
        )


def needs_calibration(config: Config) -> bool:
    """Whether this config reads calibration inputs: always."""
    return True


def sizes(config: Config, d_ff: int) -> Sizes:
    """Neurons of the parts. Raises InputError when they do not fit."""
    return replace(clusters.sizes(config.start(d_ff), d_ff), rewritten=3)


def operations(config: Config, d_ff: int, d_model: int, tokens: int) -> float:
    """What deciding one gated FFN takes: its start, then steps of three passes."""
    start = clusters.operations(config.start(d_ff), d_ff, d_model, tokens)
    return start + 3 * 6 * config.steps * config.batch * d_model * d_ff * config.active


def held(config: Config, d_ff: int, tokens: int) -> float:
    """fp32 numbers at the peak of deciding one FFN: what its start holds."""
    return clusters.held(config.start(d_ff), d_ff, tokens)


def check(config: Config, d_ff: int) -> None:
    """Raises InputError when an FFN of ``d_ff`` neurons cannot be split this way."""
    sizes(config, d_ff)
