"""What is trained of a converted model, towards what, and the presets. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moesaic.errors import InputError
from moesaic.options import study
from moesaic.train.config import TrainConfig

LoRATarget = Literal["experts", "attention"]


class LoRAOptions(BaseModel):
    """Low-rank changes of matrices: W + alpha / r B A, merged into W at the end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=8, gt=0, description="Rank r.")
    alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False, description="Scale alpha; the factor is alpha / r.")
    dropout: float = study(default=0.0, ge=0, lt=1, description="Dropout on what A multiplies.")
    targets: tuple[LoRATarget, ...] = Field(
        default=("experts", "attention"),
        min_length=1,
        description="experts: gate, up and down of the converted FFNs, shared and routed experts alike. attention: the "
        "projections of the attention.",
    )


class LossWeights(BaseModel):
    """The loss is the sum of these, each times its weight; 0 leaves one out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kl: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="KL divergence from the dense model's next-token choices."
    )
    next_token: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="Cross-entropy of the text's next token."
    )
    hidden: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Squared distance of every layer's output from the dense model's, relative, mean over layers.",
    )

    @model_validator(mode="after")
    def _some(self) -> LossWeights:
        if not any((self.kl, self.next_token, self.hidden)):
            raise InputError("every loss has weight 0", "give kl, next_token or hidden a weight")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense model runs beside."""
        return self.kl > 0 or self.hidden > 0


class TuneConfig(BaseModel):
    """One recovery run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lora: LoRAOptions | None = Field(default_factory=LoRAOptions, description="Low-rank changes; null for none.")
    loss: LossWeights = Field(default_factory=LossWeights, description="What is minimised.")
    gate: Literal["auto", "keep", "sigmoid"] = Field(
        default="auto",
        description="sigmoid: weigh a chosen expert by 2 sigmoid(z), which starts near 1, trains the router, and is "
        "glm4_moe's own form, so that it is exported exactly; it takes linear routers. auto: that for folders of "
        "glm4_moe whose routers are linear and trained, else keep.",
    )
    gate_spread: float = study(
        default=0.1,
        gt=0,
        le=1,
        description="Root mean square of the scores z under a new sigmoid gate (tau, folded into the router): weights "
        "start at about 1 +- half of it.",
    )
    router_rate: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Learning rate of routers, relative to the root mean square of their weights; 0 freezes them.",
    )
    scale_rate: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Learning rate of the expert scales s of the `scaled` gate, g = 1 + p s (CMoE); 0 freezes them.",
    )
    balance: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Step gamma of the selection bias b: after each step down where an expert's load is over the mean, "
        "up where it is under (CMoE); 0 leaves it.",
    )
    train: TrainConfig = Field(default_factory=TrainConfig, description="Data, steps, optimiser.")

    @model_validator(mode="after")
    def _some(self) -> TuneConfig:
        if self.lora is None and not any((self.router_rate, self.scale_rate)):
            raise InputError("nothing is trained", "set lora, router_rate or scale_rate")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "distill": {
        "lora": {"rank": 16, "alpha": 32.0},
        "loss": {"kl": 1.0},
        "router_rate": 1e-3,
        "train": {"learning_rate": 4e-4, "warmup": 20, "batch": 4, "steps": 512},
    },
    "router": {
        "lora": None,
        "loss": {"kl": 1.0},
        "router_rate": 3e-3,
        "scale_rate": 1e-3,
        "balance": 1e-3,
        "train": {"learning_rate": 1e-3, "warmup": 20, "batch": 4, "steps": 256},
    },
    "cmoe": {  # CMoE section 6, reference code: Adam, constant rate, one epoch
        "lora": {"rank": 8, "alpha": 32.0, "dropout": 0.1},
        "loss": {"kl": 0.0, "next_token": 1.0},
        "gate": "keep",
        "scale_rate": 1e-3,
        "balance": 1e-3,
        "train": {
            "learning_rate": 5.65e-5,
            "betas": [0.9, 0.95],
            "schedule": "constant",
            "clip": None,
            "batch": 2,
            "steps": 1024,
            "data": {"sources": ["wikitext"], "tokens": 2048 * 2048, "window": 2048},
        },
    },
}
"""Name -> keys of :class:`TuneConfig`."""

DEFAULT_PRESET = "distill"


def preset(name: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    """The keys of a preset with ``values`` over them, section by section. Raises InputError for an unknown name."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}", f"known: {', '.join(PRESETS)}")
    return _over(PRESETS[name], values or {})


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        own = merged.get(key)
        merged[key] = _over(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return merged
