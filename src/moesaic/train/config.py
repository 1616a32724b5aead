"""How something is trained, as data. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moesaic.calibration.config import CalibrationConfig, Source
from moesaic.errors import InputError
from moesaic.options import study

if TYPE_CHECKING:
    import torch

_WATCHING = ("log_every", "save_every")
"""Keys that change what is written on the way, not what is learned."""


class TrainConfig(BaseModel):
    """One training run: how many sequences, in which order, with which optimiser, and when to stop."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=512, gt=0, description="Optimiser steps.")
    batch: int = Field(default=4, gt=0, description="Sequences per step, over all processes.")
    accumulate: int = Field(
        default=1, gt=0, description="Parts that a process cuts its sequences of a step into, to save memory."
    )
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False, description="Peak learning rate of AdamW.")
    weight_decay: float = study(default=0.0, ge=0, allow_inf_nan=False, description="AdamW's decoupled weight decay.")
    betas: tuple[float, float] = study(default=(0.9, 0.95), description="AdamW's decay rates of the two moments.")
    schedule: Literal["constant", "linear", "cosine"] = study(
        default="cosine", description="Course of the learning rate after warm-up; linear and cosine end at 0."
    )
    warmup: int = study(default=0, ge=0, description="Steps of linear rise of the learning rate; at most half of all.")
    clip: float | None = study(default=1.0, gt=0, description="Largest norm of the gradient; null does not clip.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Matrix products in bf16 (what is trained and its optimiser stay in fp32); auto is bf16 where the "
        "device multiplies it natively.",
    )
    seed: int = study(instead="--seed", default=0, description="Seed of the order of the data and of all noise.")
    log_every: int = study(default=1, gt=0, description="Steps between two lines of train.jsonl.")
    eval_every: int = Field(default=50, gt=0, description="Steps between two evaluations on held-out text.")
    save_every: int = Field(default=50, gt=0, description="Steps between two saved states.")
    patience: int | None = Field(
        default=None, gt=0, description="Stop after so many evaluations without a better one; null never stops early."
    )
    held_out: int = Field(default=16, ge=0, description="Windows kept apart for evaluation; 0 for none.")
    data: CalibrationConfig = study(
        instead="--data, --tokens and --window, or --calib to a conversion",
        default=CalibrationConfig(sources=(Source.parse("mix"),), tokens=131072, window=512),
        description="The text: sources, `tokens` of distinct training text (repeated where steps need more), window.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.batch % self.accumulate:
            raise InputError(
                f"batch {self.batch} cannot be cut into {self.accumulate} parts", "accumulate must divide the batch"
            )
        if self.patience is not None and not self.held_out:
            raise InputError("patience without held-out text", "keep some windows apart, or leave patience out")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas {self.betas} outside [0, 1)", "the usual ones are (0.9, 0.95)")
        return self

    def resolved_dtype(self, device: torch.device | None = None) -> torch.dtype:
        """The dtype of matrix products that ``precision`` means on a device; None is the CPU."""
        names = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}
        return CalibrationConfig.model_validate({"compute_dtype": names[self.precision]}).resolved_dtype(device)

    def identity(self) -> dict[str, object]:
        """What the result depends on: all keys but those that only decide how often something is written."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in _WATCHING}
