"""Weights on grids of a few bits: rounding to nearest, better ranges by least squares, the nibbles of int8, noise.

Scales and offsets are rounded to bf16 first, and codes are chosen with what is left of them, as in files.

Axes: R rows, C columns along which weights are grouped, G groups, N weights of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-12
_SHRUNK = tuple(1 - 0.05 * step for step in range(13))
"""Ranges that are tried, relative to that of the group's weights."""


@dataclass(frozen=True)
class Grid:
    """Integer codes_RGN as fp32, with scale_RG1 and offset_RG1; the matrix has ``columns``, the rest is padding."""

    codes_RGN: Tensor
    scale_RG1: Tensor
    offset_RG1: Tensor
    columns: int

    def decoded(self) -> Tensor:
        """scale * code + offset, fp32 [R, C]."""
        return self.of(self.codes_RGN)

    def of(self, codes_RGN: Tensor) -> Tensor:
        """The matrix of other codes on the same grid, fp32 [R, C]."""
        return (self.scale_RG1 * codes_RGN + self.offset_RG1).flatten(1)[:, : self.columns]


def asymmetric(w_RC: Tensor, bits: int, group: int) -> Grid:
    """Codes 0 to 2^bits - 1 from the smallest to the largest weight of each group."""
    w_RGN = _grouped(w_RC, group)
    return _between(w_RGN, w_RGN.amin(2, True), w_RGN.amax(2, True), bits, w_RC.shape[1])


def symmetric(w_RC: Tensor, group: int) -> Grid:
    """int8: codes -127 to 127, the largest absolute weight of each group at an end."""
    w_RGN = _grouped(w_RC, group)
    scale_RG1 = _bf16(w_RGN.abs().amax(2, True) / 127)
    codes_RGN = (w_RGN / scale_RG1.clamp(min=_TINY)).round().clamp(-127, 127)
    return Grid(codes_RGN, scale_RG1, torch.zeros_like(scale_RG1), w_RC.shape[1])


def least_squares(w_RC: Tensor, bits: int, group: int, importance_C: Tensor | None = None) -> Grid:
    """The grid of least squared error among shrunk ranges, each with scale and offset refitted to its codes once.

    ``importance_C``: how much a column's error counts, such as the mean square of what it multiplies.
    """
    w_RGN = _grouped(w_RC, group)
    weight_RGN = torch.ones_like(w_RGN)
    if importance_C is not None:
        weight_RGN = _grouped(importance_C[None].to(w_RC), group).expand_as(w_RGN)
    low_RG1, high_RG1 = w_RGN.amin(2, True), w_RGN.amax(2, True)
    best, error_RG1 = None, torch.full_like(low_RG1, torch.inf)
    for factor in _SHRUNK:
        middle_RG1, half_RG1 = (low_RG1 + high_RG1) / 2, factor * (high_RG1 - low_RG1) / 2
        plain = _between(w_RGN, middle_RG1 - half_RG1, middle_RG1 + half_RG1, bits, w_RC.shape[1])
        for grid in (plain, _fitted(plain, w_RGN, weight_RGN, bits)):
            residual_RGN = grid.scale_RG1 * grid.codes_RGN + grid.offset_RG1 - w_RGN
            found_RG1 = (weight_RGN * residual_RGN.square()).sum(2, True)
            better_RG1 = found_RG1 < error_RG1
            error_RG1 = torch.where(better_RG1, found_RG1, error_RG1)
            best = grid if best is None else _where(better_RG1, grid, best)
    assert best is not None
    return best


def high_nibble(grid: Grid) -> Tensor:
    """The weights that high nibbles of int8 codes tell: 16 floor(code / 16) + 8, the middle of what is left open."""
    return grid.of(16 * (grid.codes_RGN / 16).floor() + 8)


def with_noise(w_RC: Tensor, group: int, generator: torch.Generator) -> Tensor:
    """The weights and uniform noise as wide as one step of a 4-bit grid over each group."""
    grid = asymmetric(w_RC, 4, group)
    step_RC = grid.scale_RG1.expand_as(grid.codes_RGN).flatten(1)[:, : grid.columns]
    return w_RC + step_RC * (torch.rand(w_RC.shape, generator=generator) - 0.5)


def _grouped(w_RC: Tensor, group: int) -> Tensor:
    """Groups along the columns; the last one is filled up with its last weight, which changes no range."""
    missing = -w_RC.shape[1] % group
    filled = torch.cat([w_RC, w_RC[:, -1:].expand(-1, missing)], dim=1)
    return filled.float().reshape(len(w_RC), -1, group)


def _between(w_RGN: Tensor, low_RG1: Tensor, high_RG1: Tensor, bits: int, columns: int) -> Grid:
    scale_RG1, offset_RG1 = _bf16((high_RG1 - low_RG1) / (2**bits - 1)), _bf16(low_RG1)
    return Grid(_codes(w_RGN, scale_RG1, offset_RG1, bits), scale_RG1, offset_RG1, columns)


def _fitted(grid: Grid, w_RGN: Tensor, weight_RGN: Tensor, bits: int) -> Grid:
    """Scale and offset by weighted least squares for the codes as they are, then the codes anew."""
    total_RG1 = weight_RGN.sum(2, True).clamp(min=_TINY)
    mean_w_RG1 = (weight_RGN * w_RGN).sum(2, True) / total_RG1
    mean_c_RG1 = (weight_RGN * grid.codes_RGN).sum(2, True) / total_RG1
    spread_RGN = weight_RGN * (grid.codes_RGN - mean_c_RG1)
    slope_RG1 = (spread_RGN * w_RGN).sum(2, True) / (spread_RGN * grid.codes_RGN).sum(2, True).clamp(min=_TINY)
    scale_RG1, offset_RG1 = _bf16(slope_RG1), _bf16(mean_w_RG1 - slope_RG1 * mean_c_RG1)
    return Grid(_codes(w_RGN, scale_RG1, offset_RG1, bits), scale_RG1, offset_RG1, grid.columns)


def _where(better_RG1: Tensor, one: Grid, other: Grid) -> Grid:
    return Grid(
        torch.where(better_RG1, one.codes_RGN, other.codes_RGN),
        torch.where(better_RG1, one.scale_RG1, other.scale_RG1),
        torch.where(better_RG1, one.offset_RG1, other.offset_RG1),
        one.columns,
    )


def _codes(w_RGN: Tensor, scale_RG1: Tensor, offset_RG1: Tensor, bits: int) -> Tensor:
    return ((w_RGN - offset_RG1) / scale_RG1.clamp(min=_TINY)).round().clamp(0, 2**bits - 1)


def _bf16(t: Tensor) -> Tensor:
    return t.to(torch.bfloat16).float()
