"""What every target architecture is: an object that says whether it can hold a split model, and how it is written.

A target is one file with a ``TARGET`` (see ``mixtral.py``) and one line in ``targets/__init__.py``. No torch here:
``moesaic plan`` asks targets too. What writes tensors imports it where it begins.

Axes: D model width, M neurons per expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moesaic.anatomy.base import Anatomy
from moesaic.anatomy.wrappers import Whole
from moesaic.blueprint.shape import FFNShape
from moesaic.targets.limits import Limits

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
        expected: Before anything is decided, what each converted FFN will be.
        whole: The multimodal model that the dense one stays in; only the ``moesaic`` target can hold it.
    """

    anatomy: Anatomy
    plans: Mapping[str, LayerPlan] = field(default_factory=dict)
    specs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attention: Mapping[str, AttentionPlan] = field(default_factory=dict)
    expected: Mapping[str, FFNShape] = field(default_factory=dict)
    whole: Whole | None = None

    @cached_property
    def shapes(self) -> Mapping[str, FFNShape]:
        """Every converted FFN's shape, by module path."""
        return {path: plan.shape for path, plan in self.plans.items()} or self.expected

    def shape_of(self, layer: int) -> FFNShape | None:
        """The shape of a dense model's decoder layer, None when it stays dense."""
        return self.shapes.get(self.path_of(layer))

    def path_of(self, layer: int) -> str:
        """Module path of the FFN of a dense model's decoder layer."""
        return f"{self.anatomy.layer_path(layer)}.{self.anatomy.family.ffn}"

    @property
    def routed(self) -> list[FFNShape]:
        """The shapes that have routed experts."""
        return [shape for shape in self.shapes.values() if shape.experts]

    @property
    def dense_layers(self) -> list[int]:
        """Decoder layers whose FFN has no routed experts, converted or not."""
        shapes = map(self.shape_of, range(self.anatomy.num_layers))
        return [layer for layer, shape in enumerate(shapes) if shape is None or not shape.experts]


def approximates(split: Split, *, normalised: bool) -> bool:
    """Whether a stock router only approaches the plans' weights of 1.

    ``normalised``: it divides by the sum over the chosen experts, so that a single one has weight 1 whatever its score.
    """
    return any(
        shape.weighs_one and not shape.always_on and not (normalised and shape.top_k == 1)
        for shape in split.shapes.values()
    )


@dataclass(frozen=True)
class VLLMGaps:
    """Where vLLM computes something else than transformers, mostly without complaint.

    Attributes:
        unread_biases: Projections whose biases it drops.
        natural_heads: It takes hidden_size / heads for head_dim.
        asks_qkv_bias: It reads biases of query, key and value, whatever config.json says.
        unties: It overlooks tied embeddings.
    """

    unread_biases: tuple[str, ...] = ()
    natural_heads: bool = False
    asks_qkv_bias: bool = False
    unties: bool = False


@dataclass(frozen=True)
class Target(ABC):
    """One architecture of the output.

    Attributes:
        name: As in ``--target``, and the ``model_type`` of a stock architecture.
        summary: What it holds, in one line.
        engines: The software that loads its folders with no code of ours.
        limits: What fits into it; None where the target judges by itself.
        normalised: Weights are divided by their sum over the chosen experts.
        times: What down projections of routed experts are multiplied by on disk, so that the sum comes out right.
        vllm: See :class:`VLLMGaps`.
    """

    name: str
    summary: str
    engines: tuple[str, ...]
    limits: Limits | None = None
    normalised: bool = True
    times: Literal["one", "top_k", "experts"] = "one"
    vllm: VLLMGaps = VLLMGaps()

    @property
    def stock(self) -> bool:
        """Whether it is a MoE architecture that engines know without us."""
        return self.limits is not None

    @property
    def replicates(self) -> bool:
        """Whether shared neurons are copied into every routed expert, as there is no shared one."""
        return self.limits is not None and not self.limits.shared_expert

    @property
    def freedom(self) -> Literal["none", "leading", "any", "widths"]:
        """How layers may differ: which of them may stay dense, or in width as well."""
        return "none" if self.limits is None else self.limits.dense_layers

    def reasons(self, split: Split) -> list[str]:
        """Why this architecture cannot hold the model, naming what does not fit and what would; [] if it can.

        Where nothing is decided or expected yet, only what config.json shows is judged. Imports transformers.
        """
        from moesaic.targets.reasons import backbone_reasons, layer_reasons

        if self.limits is None:
            return self.split_reasons(split)
        return backbone_reasons(split.anatomy, self.limits) + layer_reasons(split, self.limits)

    def split_reasons(self, split: Split) -> list[str]:
        """:meth:`reasons` as far as they show without transformers, whose defaults config.json may leave out."""
        from moesaic.targets.reasons import layer_reasons, written_reasons

        assert self.limits is not None
        return written_reasons(split.anatomy, self.limits) + layer_reasons(split, self.limits)

    def exact(self, split: Split, options: TargetOptions) -> bool:
        """Whether it computes the same function, rounding apart; if not, weights of 1 are approached (``eps``)."""
        return self.limits is None or not approximates(split, normalised=self.normalised)

    def factor(self, split: Split, options: TargetOptions) -> int:
        """What the down projections of routed experts are multiplied by on disk; rounded unless a power of two."""
        if self.times == "one":
            return 1
        return max(shape.top_k if self.times == "top_k" else shape.experts for shape in split.routed)

    def stored(self, shape: FFNShape, split: Split, options: TargetOptions) -> tuple[int, int]:
        """Neurons of a converted FFN as written, and rows of width D in fp32 beside them (the router, a gate)."""
        from moesaic.targets.config import geometry

        geo = geometry(split, options)
        shared = geo.shared * (geo.experts if self.replicates else 1)
        return geo.experts * geo.width + shared, geo.experts

    @abstractmethod
    def config_json(self, split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
        """config.json, with ``provenance`` as its block ``moesaic``."""

    @abstractmethod
    def layer_tensors(
        self, split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
    ) -> dict[str, Tensor]:
        """The tensors of one decoder layer as they stand on disk.

        Args:
            split: The whole model.
            layer: Index of the decoder layer.
            copied: Its dense tensors but those of converted FFNs, under the names of the dense model's modules.
            packed: Its converted FFNs.
            options: How to approximate and to pad.
        """

    def rest_tensors(self, split: Split, copied: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors outside the decoder layers, from the dense model's; a stock model gets a head of its own."""
        if self.limits is None:
            return dict(copied)
        from moesaic.targets.tensors import untied_rest

        return untied_rest(split, copied)

    def files(self) -> dict[str, str]:
        """Further text files of the folder, by name."""
        return {}
