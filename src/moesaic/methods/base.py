"""What every method is: a config and a function from one FFN (and what it saw in calibration) to its plan.

A method is a folder: ``config.py`` has a ``Config``, a :class:`MethodConfig`; ``method.py`` has the names of
:class:`MethodModule`, or of :class:`ModelMethodModule` where all FFNs are decided together by training. One line in
``methods/__init__.py`` registers it. Methods decide; they never write weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moesaic.anatomy.base import Anatomy
    from moesaic.blueprint.attention import AttentionPlan
    from moesaic.blueprint.layer import LayerPlan
    from moesaic.blueprint.layout import Layout
    from moesaic.blueprint.shape import FFNShape
    from moesaic.calibration.inputs import SiteInputs
    from moesaic.checkpoint.reader import Checkpoint
    from moesaic.nn.ffn import FFNWeights
    from moesaic.progress import Progress
    from moesaic.train.config import TrainConfig


HELD_TOKENS = 2048
"""Tokens whose activations are held at a time, but where a method says otherwise."""


class MethodConfig(BaseModel, ABC):
    """Options of a method, and all that is known from them before any work. No torch: ``moesaic plan`` reads it.

    Frozen; unknown keys are rejected.

    Attributes:
        whole_model: All FFNs are decided together, by training on the whole model (:class:`ModelMethodModule`).
        min_tokens_per_neuron: Experts of an existing MoE whose router sent them fewer stay whole.
        text: What it wants of the calibration text beside the defaults: fields of ``CalibrationConfig``.
        has_active: There is an option ``active``, the fraction of the neurons that a token uses.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    whole_model: ClassVar[bool] = False
    min_tokens_per_neuron: ClassVar[float] = 0.0
    has_active: ClassVar[bool] = False
    text: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @abstractmethod
    def sizes(self, d_ff: int) -> FFNShape:
        """How wide the parts of an FFN of ``d_ff`` neurons become. Raises InputError when they do not fit."""

    def check(self, d_ff: int) -> None:
        """Raise InputError when an FFN of ``d_ff`` neurons cannot be split this way."""
        self.sizes(d_ff)

    def check_text(self, windows: int) -> None:
        """Raise InputError when so many windows of calibration text are too few."""

    def needs_calibration(self) -> bool:
        """Whether the method must be given what the FFNs read."""
        return False

    def operations(self, d_ff: int, d_model: int, tokens: int) -> float:
        """Of deciding one FFN, where they count beside those of the model itself."""
        return 0.0

    def held(self, d_ff: int, tokens: int) -> float:
        """fp32 numbers at the peak of deciding one FFN, beside its weights in fp32: by default a batch of activations
        with what they are made of."""
        return 4 * min(tokens, HELD_TOKENS) * d_ff

    @property
    def own_layout(self) -> Layout | None:
        """The layout that decides the sizes, where one does."""
        return None

    @property
    def training(self) -> TrainConfig | None:
        """How it trains on the whole model, where it does."""
        return None

    @property
    def prunes_attention(self) -> bool:
        """Whether attention is pruned too, which only the ``moesaic`` architecture holds."""
        return False


class MethodModule(Protocol):
    """What a method's ``method.py`` holds."""

    @staticmethod
    def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Any, seed: int) -> LayerPlan:
        """Decide one FFN's split.

        Args:
            weights: The dense FFN, in the checkpoint's dtype.
            inputs: Its calibration inputs; None when ``config.needs_calibration()`` is False.
            config: The method's own config, an instance of its ``Config``.
            seed: Differs from site to site, fixed for a run; the only source of randomness.
        """
        ...


@dataclass(frozen=True)
class ModelContext:
    """What a method reads that decides a whole model at once.

    Attributes:
        checkpoint: The dense model.
        anatomy: Its structure.
        ids_NW: Training text, token ids int64 [windows, tokens per window].
        dense_layers: Decoder layers that stay dense, counted from 0.
        seed: The only source of randomness.
        folder: Where states of a long training are kept, so that the same call resumes.
        progress: Receives steps done.
        device: Where it trains; of several processes each has its own.
    """

    checkpoint: Checkpoint
    anatomy: Anatomy
    ids_NW: Tensor
    dense_layers: tuple[int, ...]
    seed: int
    folder: Path
    progress: Progress
    device: torch.device


@dataclass(frozen=True)
class ModelPlan:
    """Every converted FFN's plan and every changed attention's, by module path, and a report for results.json."""

    sites: dict[str, LayerPlan]
    attention: dict[str, AttentionPlan] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


class ModelMethodModule(Protocol):
    """What the ``method.py`` of a method holds that trains on the whole model."""

    @staticmethod
    def plan_model(context: ModelContext, config: Any) -> ModelPlan:
        """Decide all FFNs outside ``context.dense_layers``, and attention where the config asks for it.

        Of several processes (``moesaic.train.launch``) all train, and the plan of the first counts.
        """
        ...
