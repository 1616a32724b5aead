"""Options of ToMoE. No torch here."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, model_validator

from moesaic.blueprint.shape import FFNShape
from moesaic.errors import InputError
from moesaic.methods.base import MethodConfig
from moesaic.options import study
from moesaic.train.config import TrainConfig

_LONG = {"learning_rate": 1e-3, "weight_decay": 0.05, "betas": (0.9, 0.999), "schedule": "constant", "clip": None}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "kd_weight": 1.0,
        "budget_weight": 8.0,
        "union_weight": 2.0,
        "balance_weight": 0.5,
        "budget_control": "penalty",
        "width": "max",
        "offset": False,
        "train": {**_LONG, "steps": 10000, "batch": 1},
    },
    "reference": {
        "kd_weight": 2.0,
        "budget_weight": 16.0,
        "union_weight": 1.5,  # 3 over all sub-modules, of which half are FFNs
        "balance_weight": 1.0,
        "train_noise": True,
        "budget_control": "penalty",
        "width": "max",
        "offset": False,
        "train": {**_LONG, "steps": 20000, "batch": 1},
    },
    "cpu": {
        "kd_weight": 1.0,
        "union_weight": 0.2,
        "balance_weight": 0.5,
        "budget_control": "exact",
        "width": "mean",
        "offset": True,
        "start": "clusters",
        "attention_rate": 4e-3,
        "cap": "budget",
        "train": {
            "steps": 300,
            "batch": 2,
            "learning_rate": 2e-3,
            "betas": (0.9, 0.98),
            "schedule": "cosine",
            "warmup": 10,
            "clip": None,
            "eval_every": 50,
            "save_every": 50,
            "held_out": 8,
        },
    },
}
"""What a preset sets; options given explicitly win. The paper's weights of R_P and R_L could not be read: the
reference's ratios to the distillation loss stand in."""


class Config(MethodConfig):
    """Options of ToMoE."""

    has_active = True
    whole_model = True
    text = MappingProxyType({"tokens": 131072, "window": 512})  # enough to train on and to hold some out

    preset: Literal["cpu", "paper", "reference"] = Field(
        default="cpu",
        description="Named settings. paper, reference: those of the publication and of its code, for tens of thousands "
        "of steps. cpu: ours, for some hundreds of steps.",
    )
    active: float = Field(
        default=0.5, gt=0, le=1, description="Share of the counted parameters that one token uses (p)."
    )
    counted: Literal["model", "ffn"] = Field(
        default="model",
        description="What `active` is a share of. model: all attention and FFN projections, as in the paper. ffn: the "
        "FFNs alone.",
    )
    experts: int = Field(default=8, ge=1, description="Experts per FFN (N); 1 is a static mask, the control.")
    top_k: int = Field(
        default=1,
        ge=1,
        description="Experts per token. With more than one each counts 1 / top_k, so that a neuron in all of them is "
        "fully on. Ours: the paper has 1.",
    )
    attention: Literal["none", "pairs", "values", "both", "dynamic"] = Field(
        default="none",
        description="What is pruned in attention. pairs: rotary pairs of queries and keys, for all tokens. values: "
        "dims of values and output, per token. both: the paper. dynamic: both per token, a study for training from "
        "Python, which no conversion writes. Anything but none needs the moesaic architecture.",
    )
    masks: Literal["learned", "random"] = study(
        default="learned", description="random: the control, masks drawn once and kept; only the router is trained."
    )
    start: Literal["noise", "clusters"] | str = Field(
        default="noise",
        description="Where masks and router begin. noise: all on, as in the paper. clusters (the preset cpu): token "
        "clusters and the neurons of largest energy on each. Else the folder of a "
        "blueprint whose FFNs have as many experts.",
    )
    start_margin: float = study(
        default=1.5,
        gt=0,
        description="How far from the threshold a start that is not noise puts the logits.",
    )
    temperature: float = study(default=0.4, gt=0, description="Temperature of both relaxations (tau).")
    bias: float = study(default=3.0, description="Added to every mask logit (b): masks start on.")
    embedding: int = study(default=128, ge=8, multiple_of=4, description="Width of an expert embedding (d_e).")
    train_noise: bool = study(
        default=False, description="Whether the hypernetwork's random input (Z) is trained; the reference's code does."
    )
    offset: bool = study(
        default=True,
        description="Add a trained logit per expert and neuron to the decoded one. Ours: learns much faster.",
    )
    offset_rate: float = study(default=0.05, gt=0, description="Learning rate of these logits.")
    router_rate: float | None = study(
        default=None, gt=0, description="Learning rate of the routers; null takes that of the rest."
    )
    attention_rate: float | None = study(
        default=None, gt=0, description="Learning rate of the attention heads; null takes that of the rest."
    )
    kd_weight: float = study(default=1.0, ge=0, description="Weight of the distillation loss, KL(dense || masked).")
    budget_weight: float = study(default=8.0, ge=0, description="Weight of the budget loss R_P (alpha).")
    union_weight: float = study(default=2.0, ge=0, description="Weight of the union coverage loss R_U (beta).")
    balance_weight: float = study(default=0.5, ge=0, description="Weight of the load balance loss R_L (gamma).")
    budget_control: Literal["penalty", "exact"] = study(
        default="exact",
        description="penalty: R_P alone pulls the widths, as in the paper. exact: every step a common shift of the "
        "mask logits holds the expected widths at the budget, and the gradient along it is taken out; ours.",
    )
    descent: float = study(
        default=0.4,
        ge=0,
        lt=1,
        description="Share of the steps over which the exact budget falls from 1 to `active`; 0 starts at the budget.",
    )
    width: Literal["max", "mean"] = study(
        default="max", description="Width of an FFN in R_P: of its widest expert (the paper) or the mean; tokens alike."
    )
    reference: bool = study(
        default=False,
        description="Reproduce the reference code: masks of neurons and values drawn anew per token, applied to both "
        "branches, values masked without the output, regularisers on a second sample, cross-entropy in place of KL.",
    )
    rule: Literal["median", "expected"] = study(
        default="median",
        description="Which neurons an expert keeps, before all are shifted to the budget. median: those more often on "
        "than off. expected: as many as are on in the mean.",
    )
    widths: Literal["free", "layer", "equal"] = Field(
        default="layer",
        description="free: every expert its own width, the widest of each FFN counts. layer: equal within an FFN. "
        "equal: the same in all FFNs, which wastes no padding in stock architectures.",
    )
    cap: Literal["budget", "quantile"] = study(
        default="quantile",
        description="Most value dims that a token may use (K). budget: `active` of a head. quantile: `cap_quantile` of "
        "what held-out training text asks for.",
    )
    cap_quantile: float = study(
        default=0.99, gt=0, le=1, description="Which quantile; 1 is the largest number asked for, as in the reference."
    )
    union: bool = Field(
        default=False,
        description="Store experts as index sets over the union of their neurons. Only the moesaic architecture does; "
        "a stock one gets a copy per expert.",
    )
    train: TrainConfig = Field(
        default_factory=TrainConfig,
        description="Steps, batch, optimiser. Without its `data` and `seed`: the calibration text is trained on, with "
        "the conversion's seed.",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        preset = PRESETS.get(values.get("preset", "cpu")) if isinstance(values, dict) else None
        if preset is None:
            return values
        train = values.get("train", {})
        if isinstance(train, dict):
            train = {**preset["train"], **train}
        if values.get("masks") == "random" or values.get("offset") is False:
            preset = {**preset, "start": "noise"}
        if values.get("attention") == "dynamic":  # a common shift cannot hold pairs that differ by token
            preset = {**preset, "budget_control": "penalty"}
        if {**preset, **values}.get("start", "noise") != "noise":  # it begins at the budget: nothing to descend
            preset = {**preset, "descent": 0.0}
        return {**preset, **values, "train": train}

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.top_k > self.experts:
            raise InputError(f"top_k {self.top_k} of {self.experts} experts", "choose 1 <= top_k <= experts")
        if self.counted == "ffn" and self.attention != "none":
            raise InputError("attention is pruned but not counted", "count the whole model: counted: model")
        if self.start != "noise" and not self.offset:
            raise InputError("a start needs a logit per neuron to put it in", "set offset: true")
        if self.union and self.top_k > 1:
            raise InputError("a union of experts holds each at weight 1, which top_k > 1 does not", "set union: false")
        if self.masks == "random" and self.experts == 1:
            raise InputError("random masks with one expert leave nothing to train", "use 2 experts or more")
        if self.masks == "random" and (self.start != "noise" or self.attention == "dynamic"):
            raise InputError("random masks take no start and are fixed", "leave start and attention: dynamic out")
        if self.attention == "dynamic" and self.budget_control == "exact":
            raise InputError("an exact budget cannot hold pairs that differ by token", "use budget_control: penalty")
        changed = self.budget_control == "exact" or self.offset or self.top_k > 1 or self.masks == "random"
        if self.reference and changed:
            raise InputError(
                "reference mode is the published code alone", "add preset: reference, top_k: 1 and masks: learned"
            )
        for name, instead in (("data", "--calib"), ("seed", "--seed")):
            if getattr(self.train, name) != TrainConfig.model_fields[name].default:
                raise InputError(f"train.{name} is not read by ToMoE", f"give {instead}, which it trains with")
        return self

    def needs_calibration(self) -> bool:
        """Always: the calibration text is what it is trained on."""
        return True

    def check_text(self, windows: int) -> None:
        """Raises InputError when all windows would be held out."""
        if windows <= self.train.held_out:
            raise InputError(
                f"{windows} calibration windows, of which {self.train.held_out} are held out",
                "give more --calib-tokens, or shorter windows: --calib-window",
            )

    @property
    def training(self) -> TrainConfig:
        """See :class:`MethodConfig`."""
        return self.train

    @property
    def prunes_attention(self) -> bool:
        """See :class:`MethodConfig`."""
        return self.attention != "none"

    def sizes(self, d_ff: int) -> FFNShape:
        """What an FFN becomes on average, packed; training decides each one's widths.

        With attention counted but not pruned the FFNs get less than this.
        """
        neurons = max(1, round(self.active * d_ff))
        return (
            FFNShape(d_ff, neurons, (), 0)
            if self.experts == 1
            else FFNShape(d_ff, 0, (neurons,) * self.experts, self.top_k, union=d_ff if self.union else None)
        )

    def check(self, d_ff: int) -> None:
        """Raises InputError when an FFN of ``d_ff`` neurons cannot be split this way, or nothing could be exported."""
        check_exportable(self)
        if self.active * d_ff < 1:
            raise InputError(f"{self.active:g} of {d_ff} neurons leaves no neuron", "raise `active`")


def check_exportable(config: Config) -> None:
    """Raises InputError for a study whose outcome no plan can hold."""
    if config.attention == "dynamic":
        raise InputError(
            "token-dependent query and key masks cannot be exported", "use attention: both; dynamic is a study"
        )
