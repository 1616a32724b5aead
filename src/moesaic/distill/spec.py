"""What a student is, as data, and what it costs. No torch here.

Symbols of the paper (arXiv 2512.18452): d model width, h_s shared width, m experts, w neurons per expert, k active
experts, p router rank, A = h_s + k w active neurons.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moesaic.errors import InputError

RouterName = Literal["full", "low_rank", "product"]
Initialisation = Literal["fan_in", "active"]


class StudentSpec(BaseModel):
    """One student: a dense network (``experts`` is 0), or a shared network plus a sparse mixture of experts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shared: int = Field(ge=0, description="Width of the always-on network, h_s.")
    experts: int = Field(default=0, ge=0, description="Routed experts, m; 0 makes a dense student of width h_s.")
    top_k: int = Field(default=0, ge=0, description="Active experts per token, k.")
    width: int = Field(default=1, ge=1, description="Neurons per expert, w.")
    router: RouterName = Field(
        default="low_rank",
        description="full: r = W x + b. low_rank: r = K (P x) + b with P of rank p. product: experts are pairs (i, j) "
        "and r = K1_i q1 + K2_j q2 with q = P x, so that the search is sub-linear in m.",
    )
    rank: int = Field(default=0, ge=0, description="p of the low_rank and product routers.")
    init: Initialisation = Field(
        default="active",
        description="Start of the experts' down vectors: U(+-1/sqrt(m)) (fan_in; the paper's full-rank students) or "
        "U(+-1/sqrt(k)) (active; its low-rank students).",
    )

    @model_validator(mode="after")
    def _consistent(self) -> StudentSpec:
        if self.experts == 0:
            if self.shared == 0 or self.top_k:
                raise InputError("a dense student needs a width and routes nothing", "set shared, leave top_k at 0")
            return self
        if not 1 <= self.top_k <= self.experts:
            raise InputError(f"top-k {self.top_k} of {self.experts} experts", "choose 1 <= top-k <= experts")
        if self.router != "full" and self.rank < 1:
            raise InputError(f"a {self.router} router without a rank", "set rank, a quarter of the model width, say")
        if self.router == "product":
            if self.rank % 2:
                raise InputError(f"a product router of odd rank {self.rank}", "each half of the key needs its own")
            product_sides(self.experts)
        return self

    @property
    def dense(self) -> bool:
        """Whether nothing is routed."""
        return self.experts == 0

    @property
    def active(self) -> int:
        """Active neurons A = h_s + k w."""
        return self.shared + self.top_k * self.width

    @property
    def family(self) -> str:
        """What students of other sizes share, for people: "dense", or router, rank, experts, their width and start."""
        if self.dense:
            return "dense"
        rank = f" p={self.rank}" if self.rank else ""
        width = f" w={self.width}" if self.width > 1 else ""
        return f"{self.router}{rank} m={self.experts}{width} {self.init}"

    @property
    def split(self) -> str:
        """Shared and routed active neurons, for people: ``"h_s + k w"``; ``"h_s"`` of a dense student."""
        return str(self.shared) if self.dense else f"{self.shared} + {self.top_k * self.width}"

    def identity(self) -> str:
        """A short name that is a pure function of the fields."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Costs:
    """What one token costs and what is stored.

    Attributes:
        active: Active neurons A.
        neuron_macs: Multiply-accumulates of the active neurons, 2 d A.
        router_macs: Those of the router's scores.
        parameters: All parameters.
    """

    active: int
    neuron_macs: int
    router_macs: int
    parameters: int

    @property
    def macs(self) -> int:
        """Neurons and router."""
        return self.neuron_macs + self.router_macs

    def equal_dense_width(self, d_model: int) -> float:
        """Width of the ungated dense network of as many multiply-accumulates."""
        return self.macs / (2 * d_model)


def costs(spec: StudentSpec, d_model: int) -> Costs:
    """The accounting of a student of ungated neurons with biases at model width d."""
    d, m, p = d_model, spec.experts, spec.rank
    parameters = spec.shared * (2 * d + 1) + (d if spec.shared else 0)
    router_macs = 0
    if m:
        parameters += m * spec.width * (2 * d + 1) + d
        keys = sum(product_sides(m)) if spec.router == "product" else m
        if spec.router == "full":
            router_macs, router = d * m, d * m + m
        elif spec.router == "low_rank":
            router_macs, router = p * (d + m), p * d + m * p + m
        else:
            router_macs, router = p * d + keys * p // 2, p * d + keys * p // 2 + keys
        parameters += router
    return Costs(spec.active, 2 * d * spec.active, router_macs, parameters)


def product_sides(experts: int) -> tuple[int, int]:
    """Two factors of ``experts``, as near to each other as can be. InputError where one would be below 2."""
    small = next((side for side in range(math.isqrt(experts), 1, -1) if experts % side == 0), 1)
    if small < 2:
        raise InputError(f"{experts} experts are no grid of pairs", "choose a number with factors, 10000 say")
    return small, experts // small
