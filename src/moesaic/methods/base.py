"""What every method is: a config and a function from one FFN (and what it saw in calibration) to its plan.

A method module defines ``Config`` (a :class:`MethodConfig`), ``NEEDS_CALIBRATION`` and ``plan_site``; one line in
``methods/__init__.py`` registers it. Methods decide; they never write weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moesaic.blueprint import LayerPlan
    from moesaic.nn.ffn import FFNWeights


class MethodConfig(BaseModel):
    """Base of every method's config: frozen, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class SiteInputs:
    """What one FFN read during calibration.

    ``x_TD`` is on the CPU, may be memory-mapped and in bf16; read it through :meth:`batches`. T counts tokens (for an expert of an
    existing MoE: the tokens its own router sent to it; T may be 0).
    """

    x_TD: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.x_TD.shape[0]

    def batches(self, size: int = 2048, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """The inputs in order, ``size`` tokens at a time, optionally cast."""
        for start in range(0, self.tokens, size):
            chunk = self.x_TD[start : start + size]
            yield chunk if dtype is None else chunk.to(dtype)


class MethodModule(Protocol):
    """The shape of a method's module."""

    Config: type[MethodConfig]
    NEEDS_CALIBRATION: bool

    @staticmethod
    def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: MethodConfig, seed: int) -> LayerPlan | None:
        """Decide one FFN's split.

        Args:
            weights: The dense FFN, in the checkpoint's dtype.
            inputs: Its calibration inputs; None only when ``NEEDS_CALIBRATION`` is False.
            config: The method's own config.
            seed: Differs from site to site, fixed for a run; the only source of randomness.

        Returns:
            The plan, or None to leave this FFN dense.
        """
        ...
