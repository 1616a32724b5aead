"""What ``moesaic distill`` sweeps over, as data. No torch here."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moesaic.calibration.config import CalibrationConfig, Source
from moesaic.distill.spec import Initialisation, RouterName, StudentSpec
from moesaic.errors import InputError
from moesaic.options import study

Law = Literal["real", "gaussian"]

_DATA = CalibrationConfig(sources=(Source.parse("wikitext"),), tokens=65_536, window=512, compute_dtype="float32")


class ProbeConfig(BaseModel):
    """The dictionary probe: a top-k autoencoder of the FFN's inputs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    atoms: int = study(default=4, ge=1, description="Dictionary atoms, in multiples of the model width.")
    top_k: tuple[Annotated[int, Field(ge=1)], ...] = study(
        default=(8, 32, 128), description="Active atoms per token, one fit each; more than there are atoms: left out."
    )
    rate: float = study(default=1e-3, gt=0, allow_inf_nan=False, description="Peak learning rate.")


class DistillConfig(BaseModel):
    """The sweep: students, learning rates, laws of the inputs; and the data that they are trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pairs: tuple[tuple[int, int], ...] = Field(
        default=((8, 8), (32, 32), (128, 128)),
        min_length=1,
        description="Shared width h_s and active experts k of the MoE students; the paper's have h_s = k.",
    )
    experts: tuple[int, ...] = Field(
        default=(1000, 10000), description="Numbers of routed experts m; pairs with k > m are left out."
    )
    width: int = Field(default=1, ge=1, description="Neurons per expert w.")
    routers: tuple[RouterName, ...] = Field(
        default=("low_rank",), min_length=1, description="Routers: full, low_rank, product (search sub-linear in m)."
    )
    ranks: tuple[int | None, ...] = Field(
        default=(None,), min_length=1, description="Ranks p of low_rank and product routers; null is d/4."
    )
    inits: tuple[Initialisation, ...] = Field(
        default=("active",),
        min_length=1,
        description="Starts of the down vectors: active (1/sqrt(k)) or fan_in (1/sqrt(m)). The paper starts low-rank "
        "students with the first and full-rank ones with the second; to compare routers give both the same.",
    )
    dense_widths: tuple[int, ...] = Field(
        default=(16, 32, 64, 128, 256, 512, 1024, 2048),
        min_length=2,
        description="Widths of the dense students, between which the curve is interpolated.",
    )
    rates: tuple[float, ...] = Field(
        default=(1e-3, 3e-3, 1e-2),
        min_length=1,
        description="Peak learning rates; the validation split chooses. The paper's are 1e-4 to 1e-3, for hundreds of "
        "times as many steps.",
    )
    laws: tuple[Law, ...] = Field(
        default=("real", "gaussian"), min_length=1, description="Inputs: real, and their Gaussian twin (the control)."
    )
    epochs: int = Field(default=8, gt=0, description="Passes over the training split.")
    batch: int = Field(default=1024, gt=0, description="Tokens per step.")
    max_norm: float | None = Field(
        default=20.0,
        gt=1,
        description="Leave out tokens whose input or output is longer than so many medians: a few of them would be "
        "nearly all of the variance. Null keeps all, as the paper does.",
    )
    seed: int = study(
        instead="--seed", default=0, description="Seed of students, order and twin; the text has its own in data."
    )
    probe: ProbeConfig | None = Field(
        default=ProbeConfig(), description="Sparsity of the inputs in a learned dictionary; null leaves it out."
    )
    data: CalibrationConfig = study(
        instead="--data, --tokens and --window",
        default=_DATA,
        description="Text whose activations are captured: eight tenths to train on, one to select, one to report. What "
        "is not given is as here, not as in `convert`.",
    )

    @field_validator("data", mode="before")
    @classmethod
    def _fill_data(cls, data: Any) -> Any:
        return {**_DATA.model_dump(), **data} if isinstance(data, dict) else data

    @field_validator("rates")
    @classmethod
    def _rates_positive(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < rate < float("inf") for rate in rates):
            raise InputError(f"learning rates {list(rates)} are not all positive", "the paper's are 1e-4, 3e-4, 1e-3")
        return rates

    @model_validator(mode="after")
    def _some_student(self) -> DistillConfig:
        self.students(64)
        return self

    def students(self, d_model: int) -> list[StudentSpec]:
        """All students, dense ones first. InputError for one that cannot be; those with k > m are left out."""
        found = [StudentSpec(shared=width) for width in sorted(set(self.dense_widths))]
        axes = itertools.product(self.routers, self.ranks, self.inits, self.experts, self.pairs)
        for router, rank, init, experts, (shared, k) in axes:
            if k > experts:
                continue
            p = 0 if router == "full" else max(2, d_model // 8 * 2) if rank is None else rank
            values = {"shared": shared, "experts": experts, "top_k": k, "width": self.width}
            spec = StudentSpec.model_validate(values | {"router": router, "rank": p, "init": init})
            if spec not in found:
                found.append(spec)
        if not any(not spec.dense for spec in found) and self.experts:
            raise InputError("every student has more active experts than experts", "raise experts or lower pairs")
        return found


@dataclass(frozen=True)
class Trial:
    """One training of the sweep: a student, or a dictionary of ``atoms`` with ``spec.top_k`` active ones."""

    law: Law
    rate: float
    spec: StudentSpec | None = None
    atoms: int = 0
    top_k: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        spec = None if self.spec is None else self.spec.model_dump(mode="json")
        return {"law": self.law, "rate": self.rate, "spec": spec, "atoms": self.atoms, "top_k": self.top_k}

    def name(self) -> str:
        """A short name that is a pure function of the fields."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def trials(config: DistillConfig, d_model: int) -> list[Trial]:
    """All trainings of a sweep, each once, cheap ones first."""
    students = config.students(d_model)
    found = [
        Trial(law, rate, spec)
        for spec, law, rate in itertools.product(students, config.laws, dict.fromkeys(config.rates))
    ]
    if config.probe is not None:
        probe = config.probe
        atoms = probe.atoms * d_model
        found += [
            Trial(law, probe.rate, None, atoms, k)
            for law, k in itertools.product(config.laws, sorted(set(probe.top_k)))
            if k <= atoms
        ]
    return found
