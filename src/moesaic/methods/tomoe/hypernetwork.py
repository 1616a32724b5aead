"""The hypernetwork: one embedding per expert and sub-module, from a small bidirectional GRU along the depth.

Source: ToMoE (arXiv 2501.15316), section on expert embeddings; sizes as in the reference implementation.

Axes: Q sub-modules in model order (attention and FFN of layer 0, of layer 1, ...), N experts, Z input width, R
embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Hypernetwork(nn.Module):
    """E = GRU(Z). Depth is the sequence, experts are the batch: they differ by their rows of Z alone.

    Args:
        submodules: Q.
        experts: N.
        width: R; half of it per direction of the GRU, a quarter is the width of Z.
        train_noise: Whether Z is trained; else it is a buffer.
    """

    def __init__(self, submodules: int, experts: int, width: int = 128, train_noise: bool = False) -> None:
        super().__init__()
        z_QNZ = torch.randn(submodules, experts, width // 4)
        self.z_QNZ: Tensor
        if train_noise:
            self.z_QNZ = nn.Parameter(z_QNZ)
        else:
            self.register_buffer("z_QNZ", z_QNZ)
        self.gru = nn.GRU(width // 4, width // 2, bidirectional=True)

    def forward(self) -> Tensor:
        """E, float32 [Q, N, R]."""
        return self.gru(self.z_QNZ)[0]
