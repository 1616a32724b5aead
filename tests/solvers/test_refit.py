"""Least-squares refits of a down projection.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.solvers import refit as module
from moesaic.solvers.limits import MIN_RIDGE
from moesaic.solvers.refit import refit, refit_chosen, refit_few, stream_weights, token_weights
from moesaic.solvers.router_fit import fit_ridge


def problem(tokens: int, d_ff: int = 12, d_model: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(down_DF, h_TF with a quarter of zeros, y_TD, w_T), float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    h_TF = draw(tokens, d_ff) * (torch.rand(tokens, d_ff, generator=generator) > 0.25)
    return draw(d_model, d_ff), h_TF, draw(tokens, d_model), draw(tokens).abs() + 0.1


def closed_form(down_DF: Tensor, h_TF: Tensor, y_TD: Tensor, w_T: Tensor, ridge: float) -> np.ndarray:
    """The minimiser by stacked least squares on the change, [D, F]."""
    root = w_T.sqrt().unsqueeze(1)
    strength = ridge * float((root * h_TF).square().sum()) / h_TF.shape[1]
    stacked = np.vstack([(root * h_TF).numpy(), np.sqrt(strength) * np.eye(h_TF.shape[1])])
    wanted = np.vstack([(root * (y_TD - h_TF @ down_DF.T)).numpy(), np.zeros((h_TF.shape[1], len(down_DF)))])
    return down_DF.numpy() + np.linalg.lstsq(stacked, wanted, rcond=None)[0].T


@given(st.integers(1, 40), st.sampled_from([1e-3, 0.1, 1.0]), st.integers(0, 5), st.sampled_from([5, 1024]))
@settings(max_examples=20, deadline=None)
def test_both_forms_are_the_closed_form_for_any_batches_and_blocks(
    tokens: int, ridge: float, seed: int, block: int
) -> None:
    down_DF, h_TF, y_TD, w_T = problem(tokens, seed=seed)
    expected = closed_form(down_DF, h_TF, y_TD, w_T, ridge)
    batches = list(zip(h_TF.split(7), y_TD.split(7), w_T.split(7), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        many = refit(down_DF, batches, ridge)
    np.testing.assert_allclose(many.numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(refit_few(down_DF, h_TF, y_TD, w_T, ridge).numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ridge", [0.1, 1.0])
def test_a_solution_in_float32_is_near_that_in_float64(ridge: float) -> None:
    # Loud common neurons, as real layers have them: the condition is near its bound.
    down_DF, h_TF, y_TD, w_T = problem(900, d_ff=600)
    h_TF[:, ::7] += 30
    exact_DF = refit(down_DF, [(h_TF, y_TD, w_T)], ridge).double()
    low = [tensor.float() for tensor in (down_DF, h_TF, y_TD, w_T)]
    found_DF = refit(low[0], [tuple(low[1:])], ridge).double()  # type: ignore[list-item]
    assert float((found_DF - exact_DF).abs().max()) < 5e-3 * float((exact_DF - down_DF).abs().max())


def test_a_weak_ridge_is_solved_in_float64() -> None:
    assert module._precision(torch.float32, 4864, 0.1) == torch.float32
    assert module._precision(torch.float32, 4864, 1e-3) == torch.float64
    assert module._precision(torch.float64, 4, 1.0) == torch.float64


def test_another_readout_is_found() -> None:
    down_DF, h_TF, _, w_T = problem(200)
    other_DF = down_DF.flip(1)
    found_DF = refit(down_DF, [(h_TF, h_TF @ other_DF.T, w_T)], 1e-9)
    torch.testing.assert_close(found_DF.double(), other_DF, rtol=1e-5, atol=1e-5)


def test_a_strong_ridge_and_silence_leave_the_projection() -> None:
    down_DF, h_TF, y_TD, w_T = problem(9)
    for function in (lambda *a: refit(down_DF, [a[:3]], a[3]), lambda *a: refit_few(down_DF, *a)):
        torch.testing.assert_close(function(h_TF, y_TD, w_T, 1e12).double(), down_DF, rtol=1e-5, atol=1e-5)
        assert torch.equal(function(h_TF * 0, y_TD, w_T, 0.1).double(), down_DF)


def few_directions(noise: float, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A :func:`problem` whose outputs are those of another projection, and ``noise``."""
    down_DF, h_TF, y_TD, w_T = problem(tokens)
    return down_DF, h_TF, h_TF @ (1.2 * down_DF.T) + noise * y_TD, w_T


@pytest.mark.parametrize(("noise", "best"), [(0.01, 0.001), (30.0, 10.0)])
def test_the_ridge_is_the_one_of_least_error_on_tokens_that_are_held_out(noise: float, best: float) -> None:
    down_DF, h_TF, y_TD, w_T = few_directions(noise)
    held_T = torch.arange(400) % 7 == 3
    batches = list(zip(h_TF.split(90), y_TD.split(90), w_T.split(90), strict=True))
    ridges = (0.001, 0.1, 10.0)
    made = refit_chosen(down_DF, batches, held_T, ridges)
    assert made is not None
    found_DF, ridge = made
    assert ridge == best
    torch.testing.assert_close(found_DF, refit(down_DF, batches, best), rtol=1e-5, atol=1e-5)

    built = [(h_TF[~held_T], y_TD[~held_T], w_T[~held_T])]
    error_TD = [y_TD - h_TF @ refit(down_DF, built, each).double().T for each in ridges]
    losses = [float((w_T[held_T] * error[held_T].square().sum(dim=1)).sum()) for error in error_TD]
    assert ridges[losses.index(min(losses))] == best


def test_a_refit_that_helps_nothing_that_is_held_out_leaves_the_projection() -> None:
    down_DF, h_TF, y_TD, w_T = problem(40)
    y_TD = h_TF @ down_DF.T + 30 * y_TD
    held_T = torch.arange(40) % 8 == 0
    y_TD[held_T] = h_TF[held_T] @ down_DF.T
    assert refit_chosen(down_DF, [(h_TF, y_TD, w_T)], held_T, (0.1, 1.0)) is None


@pytest.mark.parametrize("token", [0, 1])  # held out, and built on
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_outputs_that_are_no_numbers_leave_the_projection(token: int, value: float) -> None:
    down_DF, h_TF, y_TD, w_T = problem(40)
    y_TD[token, 0] = value
    assert refit_chosen(down_DF, [(h_TF, y_TD, w_T)], torch.arange(40) % 8 == 0, (0.1, 1.0)) is None


def test_every_token_is_held_out_or_not() -> None:
    down_DF, *batch = problem(9)
    for tokens in (8, 10):
        with pytest.raises(ValueError, match="held out or not"):
            refit_chosen(down_DF, [tuple(batch)], torch.zeros(tokens, dtype=torch.bool), (1.0,))  # type: ignore[list-item]


def test_where_nothing_is_held_out_the_middle_ridge_is_taken() -> None:
    down_DF, h_TF, y_TD, w_T = problem(9)
    made = refit_chosen(down_DF, [(h_TF, y_TD, w_T)], torch.zeros(9, dtype=torch.bool), (0.1, 1.0, 3.0))
    assert made is not None
    assert made[1] == 1.0
    assert torch.equal(made[0], refit(down_DF, [(h_TF, y_TD, w_T)], 1.0))


def test_no_tokens_leave_the_projection() -> None:
    down_DF, h_TF, y_TD, w_T = problem(3)
    assert torch.equal(refit_few(down_DF, h_TF[:0], y_TD[:0], w_T[:0], 1.0).double(), down_DF)


def test_weights_make_tokens_count_alike_whatever_their_size() -> None:
    down_DF, h_TF, y_TD, _ = problem(30)
    size_T1 = torch.logspace(-2, 3, 30, dtype=torch.float64).unsqueeze(1)
    unit_T1 = y_TD.norm(dim=1, keepdim=True)
    plain = refit(down_DF, [(h_TF / unit_T1, y_TD / unit_T1, torch.ones(30, dtype=torch.float64))], 0.1)
    y_TD, h_TF = y_TD * size_T1, h_TF * size_T1
    torch.testing.assert_close(refit(down_DF, [(h_TF, y_TD, token_weights(y_TD))], 0.1), plain)


def test_tokens_without_output_weigh_nothing() -> None:
    assert token_weights(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [0.0, pytest.approx(1 / 25)]


def test_a_token_counts_by_what_its_output_is_of_the_stream_behind_it() -> None:
    y_TD = torch.tensor([[3.0, 4.0], [0.0, 5.0], [0.0, 0.0], [1.0, 0.0]])
    raw = [0.5, 2**-0.5, 0.0, 1.0]  # 25 of 100, 25 of 50, nothing, all
    weight_T = stream_weights(y_TD, torch.tensor([75**0.5, 5.0, 2.0, 0.0]))
    assert weight_T.tolist() == pytest.approx([4 * part / sum(raw) for part in raw])
    for without in (stream_weights(y_TD, None), stream_weights(torch.zeros(4, 2), torch.ones(4))):
        assert without.tolist() == [1.0] * 4


def test_the_smallest_ridge_that_options_take_solves_in_single_precision() -> None:
    """Gram matrices of fp32 products, with fewer tokens than unknowns: nearly singular."""
    down_DF, h_TF, y_TD, w_T = (tensor.float() for tensor in problem(100, d_ff=400))
    found_DF = refit(down_DF, [(h_TF, y_TD, w_T)], MIN_RIDGE)
    left, before = ((y_TD - h_TF @ matrix_DF.T).square().sum() for matrix_DF in (found_DF, down_DF))
    assert left < 1e-3 * before
    assert torch.isfinite(fit_ridge([(h_TF, y_TD)], MIN_RIDGE)).all()
