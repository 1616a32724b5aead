"""The control: Gaussian vectors with the mean and covariance of the real ones.

Axes: T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BATCH = 4096


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D], float64."""

    mean_D: Tensor
    cov_DD: Tensor


def moments(x_TD: Tensor) -> Moments:
    """Mean and covariance of the rows; two passes, so that large means cost no digits."""
    mean_D = sum((x_BD.double().sum(0) for x_BD in x_TD.split(_BATCH)), torch.zeros(x_TD.shape[1], dtype=torch.float64))
    mean_D = mean_D / len(x_TD)
    cov_DD = torch.zeros(x_TD.shape[1], x_TD.shape[1], dtype=torch.float64)
    for x_BD in x_TD.split(_BATCH):
        centred_BD = x_BD.double() - mean_D
        cov_DD += centred_BD.T @ centred_BD
    return Moments(mean_D, cov_DD / max(1, len(x_TD) - 1))


class Twin:
    """Draws from N(mean, covariance) of the rows given; directions without variance stay without."""

    def __init__(self, of: Moments) -> None:
        values_D, vectors_DD = torch.linalg.eigh((of.cov_DD + of.cov_DD.T) / 2)
        self._root_DD = vectors_DD * values_D.clamp(min=0).sqrt()
        self._mean_D = of.mean_D

    def draw(self, tokens: int, generator: torch.Generator) -> Tensor:
        """Rows [T, D], float32."""
        z_TD = torch.randn(tokens, len(self._mean_D), generator=generator, dtype=torch.float64)
        return (self._mean_D + z_TD @ self._root_DD.T).float()
