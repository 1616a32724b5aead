from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import InputError
from moesaic.nn.ffn import FFNWeights, activation_function
from moesaic.solvers.markers import Markers, atopk, cluster_counts, column_distances, normalised
from tests.ffns import random_ffn, random_inputs

F32, BF16 = torch.float32, torch.bfloat16


def naive_scores(weights: FFNWeights, x_TD: Tensor) -> Tensor:
    """|h^| in float64, neuron by neuron, straight from the definition."""
    act = activation_function(weights.activation)
    size_T = x_TD.double().norm(dim=1)

    def preactivation(rows_FD: Tensor, bias_F: Tensor | None, neuron: int) -> Tensor:
        w_D = rows_FD[neuron].double()
        offset = 0.0 if bias_F is None else bias_F[neuron].double()
        return (x_TD.double() @ w_D + offset) / (w_D.norm() * size_T)

    columns = []
    for neuron in range(weights.d_ff):
        up_T = preactivation(weights.up_FD, weights.up_bias_F, neuron)
        if weights.gate_FD is None:
            columns.append(act(up_T).abs())
        else:
            columns.append((act(preactivation(weights.gate_FD, weights.gate_bias_F, neuron)) * up_T).abs())
    return torch.stack(columns, dim=1)


def naive_marks(weights: FFNWeights, x_TD: Tensor, k: int) -> Tensor:
    order_TF = naive_scores(weights, x_TD).sort(dim=1, descending=True, stable=True).indices
    return order_TF[:, :k].sort(dim=1).values


def dense(markers: Markers) -> Tensor:
    return torch.zeros(markers.tokens, markers.d_ff).scatter_(1, markers.idx_TK, 1.0)


KINDS = [("silu", True, False), ("gelu_pytorch_tanh", True, True), ("gelu", False, True), ("relu", False, False)]


@pytest.mark.parametrize(("activation", "gated", "biases"), KINDS)
@pytest.mark.parametrize(
    ("d_ff", "k", "dtype"), [(37, 1, F32), (37, 10, F32), (37, 30, F32), (37, 37, F32), (300, 10, F32), (300, 10, BF16)]
)
def test_marks_are_the_largest_normalised_scores(
    activation: str, gated: bool, biases: bool, d_ff: int, k: int, dtype: torch.dtype
) -> None:
    weights = random_ffn(d_ff, 64, gated=gated, biases=biases, activation=activation, dtype=F32)
    weights = replace(weights, up_FD=weights.up_FD * torch.linspace(0.1, 9, d_ff)[:, None])  # lengths must not matter
    x_TD = random_inputs(50, 64, dtype=F32) * torch.linspace(0.5, 30, 50)[:, None]
    markers = atopk(weights, [x_TD], k, dtype)
    assert torch.equal(markers.idx_TK, naive_marks(weights, x_TD, k))


def test_rows_sum_to_k_and_rates_too() -> None:
    markers = atopk(random_ffn(53, dtype=F32), random_inputs(40, dtype=F32).split(7), 10)
    assert torch.equal(dense(markers).sum(dim=1), torch.full((40,), 10.0))
    assert markers.rate.sum().item() == pytest.approx(10)
    assert torch.equal(markers.counts, dense(markers).sum(dim=0).long())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), batch=st.integers(1, 40))
def test_permuted_neurons_give_permuted_marks_in_any_batches(seed: int, batch: int) -> None:
    weights, x_TD = random_ffn(53, dtype=F32, seed=seed), random_inputs(30, dtype=F32, seed=seed + 1)
    order_F = torch.randperm(53, generator=torch.Generator().manual_seed(seed))
    whole = dense(atopk(weights, [x_TD], 10))
    assert torch.equal(dense(atopk(weights.take(order_F), x_TD.split(batch), 10)), whole[:, order_F])


def test_equal_scores_mark_the_lowest_index() -> None:
    weights = random_ffn(6, gated=False, activation="relu", dtype=F32)
    repeated = weights.take(torch.arange(6).repeat(5))  # neurons i, i + 6, i + 12 ... are the same
    x_TD = random_inputs(30, dtype=F32)
    for dtype in (F32, BF16):
        assert torch.equal(atopk(repeated, [x_TD], 10, dtype).idx_TK, naive_marks(repeated, x_TD, 10))


def test_silent_tokens_mark_the_first_neurons() -> None:
    gated = random_ffn(40, dtype=F32)
    assert atopk(gated, [torch.zeros(2, 16)], 3).idx_TK.tolist() == [[0, 1, 2]] * 2
    always_off = FFNWeights(-torch.ones(40, 16), torch.ones(16, 40), "relu")
    assert atopk(always_off, [torch.ones(1, 16)], 4).idx_TK.tolist() == [[0, 1, 2, 3]]


def test_zero_rows_are_never_marked_before_others() -> None:
    weights = random_ffn(40, dtype=F32)
    weights.up_FD[:20] = 0
    assert int(atopk(weights, [random_inputs(dtype=F32)], 10).idx_TK.min()) >= 20


def test_thread_count_and_precision_do_not_change_marks() -> None:
    weights, x_TD = random_ffn(640, 192, dtype=F32), random_inputs(700, 192, dtype=F32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found += [atopk(weights, x_TD.split(256), 10, dtype).idx_TK for dtype in (F32, BF16)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_normalised_rows_have_length_one_and_biases_follow() -> None:
    weights = random_ffn(biases=True, dtype=F32)
    unit = normalised(weights)
    assert unit.gate_FD is not None
    assert torch.allclose(unit.gate_FD.norm(dim=1), torch.ones(37))
    assert torch.allclose(unit.up_FD.norm(dim=1), torch.ones(37))
    assert unit.up_bias_F is not None
    assert weights.up_bias_F is not None
    assert torch.allclose(unit.up_bias_F * weights.up_FD.norm(dim=1), weights.up_bias_F, rtol=1e-5)


def test_bad_requests_are_refused() -> None:
    weights, x_TD = random_ffn(37, dtype=F32), random_inputs(dtype=F32)
    for k in (0, 38):
        with pytest.raises(ValueError, match="markers per token"):
            atopk(weights, [x_TD], k)
    for bad in (float("nan"), float("inf")):
        x_TD[3, 2] = bad
        with pytest.raises(InputError, match="NaN or Inf"):
            atopk(weights, [x_TD], 5)


def test_no_tokens_no_marks() -> None:
    markers = atopk(random_ffn(dtype=F32), [], 5)
    assert markers.idx_TK.shape == (0, 5)
    assert markers.rate.tolist() == [0.0] * 37


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), clusters=st.integers(1, 6))
def test_distances_are_l1_to_the_mean_columns(seed: int, clusters: int) -> None:
    markers = atopk(random_ffn(29, dtype=F32, seed=seed), [random_inputs(25, dtype=F32, seed=seed)], 7)
    label_F = torch.randint(-1, clusters, (29,), generator=torch.Generator().manual_seed(seed))
    label_F[:clusters] = torch.arange(clusters)
    sizes_E = torch.bincount(label_F[label_F >= 0], minlength=clusters)
    columns_FT = dense(markers).T.double()
    means_ET = torch.stack([columns_FT[label_F == cluster].mean(dim=0) for cluster in range(clusters)])
    counts_TE = cluster_counts(markers, label_F, clusters)
    assert torch.allclose(counts_TE.T / sizes_E[:, None].double(), means_ET)
    expected_FE = (columns_FT[:, None] - means_ET[None]).abs().sum(dim=2)
    assert torch.allclose(column_distances(markers, counts_TE, sizes_E), expected_FE)
