"""Fraction of variance unexplained, batch by batch.

Axes: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EVAL_BATCH = 4096


def output_variance(y_TD: Tensor) -> float:
    """Mean over coordinates of the variance of the outputs, accumulated in fp64."""
    total_D = torch.zeros(y_TD.shape[1], dtype=torch.float64)
    square_D = torch.zeros_like(total_D)
    shift_D = y_TD[:1].double()[0]
    for y_BD in y_TD.split(EVAL_BATCH):
        centred_BD = y_BD.double() - shift_D
        total_D += centred_BD.sum(0)
        square_D += centred_BD.square().sum(0)
    return float((square_D / len(y_TD) - (total_D / len(y_TD)).square()).mean())


@torch.no_grad()
def fvu(student: Callable[[Tensor], Tensor], x_TD: Tensor, y_TD: Tensor) -> float:
    """Mean squared error of the student over the variance of the outputs: 1 for their mean, 0 for the teacher.

    Args:
        student: x_TD -> y_TD.
        x_TD: Inputs.
        y_TD: The teacher's outputs.
    """
    error = 0.0
    for x_BD, y_BD in zip(x_TD.split(EVAL_BATCH), y_TD.split(EVAL_BATCH), strict=True):
        error += float((student(x_BD) - y_BD).square().sum(dtype=torch.float64))
    return error / y_TD.numel() / output_variance(y_TD)
