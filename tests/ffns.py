"""Small random FFNs and the sum of their parts, for the tests of methods and solvers.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan
from moesaic.nn.ffn import FFNWeights


def random_ffn(
    d_ff: int = 37,
    d_model: int = 16,
    *,
    gated: bool = True,
    biases: bool = False,
    activation: str = "silu",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> FFNWeights:
    """An FFN with Gaussian weights (and biases) of unit-sized outputs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return FFNWeights(
        up_FD=draw(d_ff, d_model),
        down_DF=draw(d_model, d_ff),
        activation=activation,
        gate_FD=draw(d_ff, d_model) if gated else None,
        gate_bias_F=draw(d_ff) if gated and biases else None,
        up_bias_F=draw(d_ff) if biases else None,
        down_bias_D=draw(d_model) if biases else None,
    )


def random_inputs(tokens: int = 11, d_model: int = 16, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Gaussian tokens x_TD."""
    return torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sum_of_parts(weights: FFNWeights, plan: LayerPlan, x_TD: Tensor) -> Tensor:
    """Shared part plus every expert with weight 1 plus the output bias once, straight from the dense weights."""
    y_TD = torch.zeros_like(x_TD) if weights.down_bias_D is None else weights.down_bias_D.expand_as(x_TD)
    for index in (plan.shared, *plan.experts):
        y_TD = y_TD + weights.take(index)(x_TD)
    return y_TD


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|."""
    return float((actual - expected).abs().max() / expected.abs().max())
