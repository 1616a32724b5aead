"""What one FFN read during calibration.

Axes: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class SiteInputs:
    """What one FFN read during calibration.

    ``x_TD`` is on the CPU, may be memory-mapped and in bf16; read it through :meth:`batches`. T counts tokens (for an
    expert of an existing MoE: the tokens its own router sent to it; T may be 0). ``stream_T`` is the L2 norm of the
    residual stream that each token brings to the layer, in units of the FFN's output (Granite multiplies that),
    float32; None where it is not known, or says nothing.
    """

    x_TD: Tensor
    stream_T: Tensor | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return self.x_TD.shape[0]

    def batches(self, size: int = 2048, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """The inputs in order, ``size`` tokens at a time, optionally cast."""
        for start in range(0, self.tokens, size):
            chunk = self.x_TD[start : start + size]
            yield chunk if dtype is None else chunk.to(dtype)
