"""What every target architecture is: a module that says whether it can hold a split model, and how it is written.

A target is one file with the names of :class:`TargetModule`; one line in ``targets/__init__.py`` describes it. No torch
here.

Axes: D model width, M neurons per expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from moesaic.anatomy.base import Anatomy

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.blueprint.attention import AttentionPlan
    from moesaic.blueprint.layer import LayerPlan

Packed = Mapping[str, Mapping[str, "Tensor"]]
"""Per converted FFN, by module path: its tensors as ``materialise.pack`` makes them."""


class TargetOptions(BaseModel):
    """How a split model is put into a stock architecture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    eps: float = Field(
        default=1e-3,
        gt=0,
        le=0.1,
        description="Scale of the router scores where a chosen expert counts with weight 1, which stock routers reach "
        "only in the limit: weights are off by about eps/2, scores closer than 2.4e-7/eps become ties.",
    )
    exact_weights: bool = Field(
        default=True,
        description="glm4_moe: weights of exactly 1 instead of eps. Each expert gets a twin of zeros, never computed, "
        "that carries its score; routed experts take twice the memory. Top-1 and static routers are exact without.",
    )
    align: int = Field(
        default=8,
        ge=8,
        multiple_of=8,
        description="Widths of experts are padded with neurons of zeros to a multiple of this. 8 is what transformers' "
        "grouped matrix product needs; 64 suits GPU kernels, 256 the K-quants of GGUF.",
    )


@dataclass(frozen=True)
class Split:
    """A dense model and what became of its FFNs: all that a target looks at.

    Attributes:
        anatomy: Of the dense model.
        plans: Every converted FFN's plan, by module path, of the whole model: widths and counts of experts are the same
            in all layers of most architectures. Empty while nothing is decided yet.
        specs: What the runtime must know of each (``materialise.site_spec``); only the ``moesaic`` target reads them.
        attention: Every pruned attention's plan, by module path; only the ``moesaic`` target can hold them.
    """

    anatomy: Anatomy
    plans: Mapping[str, LayerPlan]
    specs: Mapping[str, Mapping[str, Any]]
    attention: Mapping[str, AttentionPlan] = field(default_factory=dict)

    def plan_of(self, layer: int) -> LayerPlan | None:
        """The plan of a dense model's decoder layer, None when it stays dense."""
        return self.plans.get(self.path_of(layer))

    def path_of(self, layer: int) -> str:
        """Module path of the FFN of a dense model's decoder layer."""
        return f"{self.anatomy.layer_path(layer)}.{self.anatomy.family.ffn}"


class TargetModule(Protocol):
    """What a target's file holds."""

    @staticmethod
    def reasons(split: Split) -> list[str]:
        """Why this architecture cannot hold the model, naming what does not fit and what would; [] if it can.

        With empty ``split.plans`` only what config.json shows is judged, before any work.
        """
        ...

    @staticmethod
    def exact(split: Split, options: TargetOptions) -> bool:
        """Whether it computes the same function, rounding apart; if not, weights of 1 are approached (``eps``)."""
        ...

    @staticmethod
    def factor(split: Split, options: TargetOptions) -> int:
        """What the down projections of routed experts are multiplied by on disk; rounded unless a power of two."""
        ...

    @staticmethod
    def config_json(split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
        """config.json, with ``provenance`` as its block ``moesaic``."""
        ...

    @staticmethod
    def layer_tensors(
        split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
    ) -> dict[str, Tensor]:
        """The tensors of one decoder layer as they stand on disk.

        Args:
            split: The whole model.
            layer: Index of the decoder layer.
            copied: Its dense tensors but those of converted FFNs, under the names of the dense model's modules.
            packed: Its converted FFNs.
            options: How to approximate and to pad.
        """
        ...

    @staticmethod
    def rest_tensors(split: Split, copied: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors outside the decoder layers, from the dense model's."""
        ...

    @staticmethod
    def files() -> dict[str, str]:
        """Further text files of the folder, by name."""
        ...
