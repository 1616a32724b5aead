"""Matrix products of statistics: operands may be rounded to bfloat16, which some CPUs multiply several times faster.

Axes: T tokens, F columns, E rows of the other factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moesaic.errors import InputError

BLOCK = 512
"""Rows that are held in float32 at a time. The allocator keeps blocks of this size; larger ones it gives back to the
system, and half of the time of an elementwise pass is then spent on fresh pages."""


@contextmanager
def rounded_products(rounded: bool = True) -> Iterator[None]:
    """Within this, oneDNN may round operands of float32 products on a CPU to bfloat16. Sums and results stay float32.

    Only where the CPU has instructions for it; elsewhere, and if not ``rounded``, nothing changes. A Gram matrix stays
    one: both of its operands are rounded alike.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not rounded or settings is None:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def check_finite(rows_TN: Tensor) -> None:
    """Refuse what calibration text made of an FFN: raises InputError where it has NaN or Inf."""
    if not bool(torch.isfinite(rows_TN).all()):
        raise InputError(
            "an FFN's inputs, outputs or energies on the calibration text contain NaN or Inf",
            "compute in float32, or check the model",
        )


def scale_rows(rows_TF: Tensor, scale_T: Tensor) -> None:
    """Multiply each row by its number, in place: 16-bit rows in float32, block by block."""
    for rows_BF, scale_B in zip(rows_TF.split(BLOCK), scale_T.split(BLOCK), strict=True):
        rows_BF.copy_(rows_BF.float().mul_(scale_B[:, None]))


def block_product(rows_TF: Tensor, other_EF: Tensor) -> Tensor:
    """``rows_TF @ other_EF.T`` in float32, [T, E]; rows of 16 bits are widened block by block."""
    other_FE = other_EF.float().T
    return torch.cat([rows_BF.float() @ other_FE for rows_BF in rows_TF.split(BLOCK)])
