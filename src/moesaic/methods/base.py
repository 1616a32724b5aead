"""What every method is: a config and a function from one FFN (and what it saw in calibration) to its plan.

A method is a folder: ``config.py`` has the names of :class:`ConfigModule`, ``method.py`` those of
:class:`MethodModule`, or of :class:`ModelMethodModule` where all FFNs are decided together by training; one line in
``methods/__init__.py`` registers it. Methods decide; they never write weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.anatomy.base import Anatomy
    from moesaic.blueprint.attention import AttentionPlan
    from moesaic.blueprint.layer import LayerPlan
    from moesaic.blueprint.shape import Sizes
    from moesaic.calibration.inputs import SiteInputs
    from moesaic.checkpoint.reader import Checkpoint
    from moesaic.nn.ffn import FFNWeights
    from moesaic.progress import Progress


class MethodConfig(BaseModel):
    """Base of every method's config: frozen, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ConfigModule(Protocol):
    """What a method's ``config.py`` holds. It imports no torch: ``moesaic plan`` reads it."""

    Config: type[MethodConfig]

    @staticmethod
    def needs_calibration(config: Any) -> bool:
        """Whether ``plan_site`` must be given inputs under this config."""
        ...

    @staticmethod
    def sizes(config: Any, d_ff: int) -> Sizes:
        """How wide the parts of an FFN of ``d_ff`` neurons become, for ``plan`` and the forecast of disk."""
        ...

    # Optional: operations(config, d_ff, d_model, tokens) -> float, of deciding one FFN, where they count beside those
    # of the model itself; ``plan`` adds them to its time.
    # Optional: held(config, d_ff, tokens) -> float, fp32 numbers that deciding one FFN holds, where not 2 T F.

    @staticmethod
    def check(config: Any, d_ff: int) -> None:
        """Raise InputError when an FFN of ``d_ff`` neurons cannot be split as ``config`` says."""
        ...


class MethodModule(Protocol):
    """What a method's ``method.py`` holds."""

    @staticmethod
    def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Any, seed: int) -> LayerPlan:
        """Decide one FFN's split.

        Args:
            weights: The dense FFN, in the checkpoint's dtype.
            inputs: Its calibration inputs; None when ``needs_calibration(config)`` is False.
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
    """

    checkpoint: Checkpoint
    anatomy: Anatomy
    ids_NW: Tensor
    dense_layers: tuple[int, ...]
    seed: int
    folder: Path
    progress: Progress


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
