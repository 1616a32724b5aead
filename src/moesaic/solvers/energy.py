"""How much a neuron or a branch can contribute: from the weights alone, or from what it did on calibration tokens.

Axes: T tokens, D model width, F neurons, N branches, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_CHUNK = 1024  # rows that are in float64 at a time: bounds the memory for very wide layers


def square_norms(matrix_RC: Tensor) -> Tensor:
    """Squared L2 norm of every row, float64 [R]."""
    if not len(matrix_RC):
        return matrix_RC.new_zeros(0, dtype=torch.float64)
    return torch.cat([rows.double().square().sum(dim=1) for rows in matrix_RC.split(_CHUNK)])


def neuron_norms(gate_FD: Tensor | None, up_FD: Tensor, down_DF: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms on the input and the output side of every neuron, float64 [F] each.

    Input side: the mean of |W_g[j]|^2 and |W_u[j]|^2 when gated, |W_u[j]|^2 when not. Output side: |W_d[:, j]|^2.
    """
    input_F = square_norms(up_FD)
    if gate_FD is not None:
        input_F = (input_F + square_norms(gate_FD)) / 2
    return input_F, square_norms(down_DF.T)


def neuron_scores(input_F: Tensor, output_F: Tensor) -> Tensor:
    """|W_d[:, j]| sqrt(|W_g[j]|^2 + |W_u[j]|^2) up to a constant: a neuron's data-free size [OURS]."""
    return (input_F * output_F).sqrt()


def branch_energies(input_F: Tensor, output_F: Tensor, branches: Sequence[Tensor]) -> Tensor:
    """Data-free energy of every branch, float64 [N]; an empty branch has 0.

    e_i = |W_d[:, I_i]|_F^2 (|W_g[I_i]|_F^2 + |W_u[I_i]|_F^2) / (2 |I_i|); ungated, |W_u[I_i]|_F^2 / |I_i| as second
    factor. Source: our reading of MLPMoE [OURS].
    """
    return torch.stack([output_F[index].sum() * input_F[index].sum() / max(1, len(index)) for index in branches])


def mean_square(batches_TF: Iterable[Tensor]) -> Tensor:
    """Mean over all tokens of the squared activations, float64 [F]. Raises ValueError when there are no tokens."""
    total_F: Tensor | None = None
    tokens = 0
    for h_TF in batches_TF:
        energy_F = h_TF.square().sum(dim=0, dtype=torch.float64)
        total_F = energy_F if total_F is None else total_F + energy_F
        tokens += len(h_TF)
    if total_F is None or tokens == 0:
        raise ValueError("mean_square needs at least one token")
    return total_F / tokens


def mean_output_energy(batches_TF: Iterable[Tensor], down_DF: Tensor) -> Tensor:
    """Mean over tokens of (h_j |W_d[:, j]|)^2, float64 [F]: what a neuron writes to the residual stream."""
    return mean_square(batches_TF) * square_norms(down_DF.T)
