"""What one FFN read during calibration.

Axes: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from moesaic.options.device import CPU
from moesaic.solvers.team import Team

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Room = Callable[[tuple[int, ...], "torch.dtype"], "Tensor"]
"""Gives host memory for a tensor of some shape and dtype, its values undefined."""


@dataclass(frozen=True)
class SiteInputs:
    """What one FFN read during calibration.

    ``x_TD`` is in host memory, may be memory-mapped and in bf16; read it through :meth:`batches`, which puts it where
    the solvers compute: on ``device``, that of the FFN's weights; None is the CPU. T counts tokens (for an
    expert of an existing MoE: the tokens its own router sent to it; T may be 0). ``stream_T`` is the L2 norm of the
    residual stream that each token brings to the layer, in units of the FFN's output (Granite multiplies that),
    float32; None where it is not known, or says nothing. ``team``: the processes that all have these inputs and may
    share out the work on them.
    """

    x_TD: Tensor
    stream_T: Tensor | None = None
    device: torch.device | None = None
    team: Team = field(default_factory=Team)
    room: Room | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return self.x_TD.shape[0]

    def batches(self, size: int = 2048, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """The inputs in order, ``size`` tokens at a time, on ``device``, optionally cast."""
        for start in range(0, self.tokens, size):
            yield self.x_TD[start : start + size].to(self.device, dtype)

    def empty(self, width: int, dtype: torch.dtype) -> Tensor:
        """Room for ``width`` numbers of every token [T, width], on ``device``; in host memory it may be a mapped file,
        as ``room`` decides."""
        import torch

        if self.room is None or (self.device is not None and self.device.type != CPU):
            return torch.empty(self.tokens, width, dtype=dtype, device=self.device)
        return self.room((self.tokens, width), dtype)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All inputs [T, D], on ``device``."""
        return self.x_TD.to(self.device, dtype)

    def part(self, rows: slice) -> SiteInputs:
        """Some of the tokens, their place in the residual stream left out."""
        return replace(self, x_TD=self.x_TD[rows], stream_T=None)
