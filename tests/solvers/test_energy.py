from __future__ import annotations

import pytest
import torch

from moesaic.solvers.energy import (
    branch_energies,
    mean_output_energy,
    mean_square,
    neuron_norms,
    neuron_scores,
    square_norms,
)
from tests.ffns import random_ffn, random_inputs


def test_square_norms_of_more_rows_than_a_chunk() -> None:
    matrix = torch.randn(2500, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(square_norms(matrix), matrix.double().square().sum(dim=1), rtol=1e-12)
    assert square_norms(matrix[:0]).shape == (0,)


@pytest.mark.parametrize("gated", [True, False])
def test_branch_energy_is_the_product_of_frobenius_norms(gated: bool) -> None:
    weights = random_ffn(gated=gated)
    index = torch.tensor([4, 1, 30])
    part = weights.take(index)
    inner = part.up_FD.square().sum()
    if part.gate_FD is not None:
        inner = (inner + part.gate_FD.square().sum()) / 2
    expected = part.down_DF.square().sum() * inner / 3
    norms = neuron_norms(weights.gate_FD, weights.up_FD, weights.down_DF)
    energies = branch_energies(*norms, [index, index[:0]])
    assert energies[0] == pytest.approx(float(expected))
    assert energies[1] == 0


def test_a_neurons_score_is_its_own_branch_energy_under_the_root_and_permutes_with_it() -> None:
    weights = random_ffn()
    norms = neuron_norms(weights.gate_FD, weights.up_FD, weights.down_DF)
    singles = branch_energies(*norms, list(torch.arange(weights.d_ff).unsqueeze(1)))
    assert torch.allclose(neuron_scores(*norms).square(), singles)
    order = torch.randperm(weights.d_ff, generator=torch.Generator().manual_seed(3))
    moved = weights.take(order)
    moved_norms = neuron_norms(moved.gate_FD, moved.up_FD, moved.down_DF)
    assert torch.allclose(neuron_scores(*moved_norms), neuron_scores(*norms)[order], rtol=1e-14)


def test_mean_output_energy_is_what_single_neurons_write_and_batches_do_not_matter() -> None:
    weights, x_TD = random_ffn(), random_inputs(23)
    written = torch.stack(
        [weights.take(torch.tensor([j]))(x_TD).square().sum(dim=1).mean() for j in range(weights.d_ff)]
    )
    h_TF = weights.hidden(x_TD)
    assert torch.allclose(mean_output_energy([h_TF], weights.down_DF), written)
    assert torch.allclose(mean_output_energy(h_TF.split(5), weights.down_DF), written)


def test_no_tokens_have_no_mean() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        mean_square([])
    with pytest.raises(ValueError, match="at least one token"):
        mean_square([torch.zeros(0, 4)])
