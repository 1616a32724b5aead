"""What stands on the map: costs are what a reader can count by hand, and references find what is planted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks.map import cost, grids
from benchmarks.map.cost import Shape, Used
from benchmarks.map.references import (
    Cats,
    LowBit,
    Nested,
    Product,
    Reference,
    Scored,
    Staged,
    Teal,
    largest,
    low_rank,
    quantile,
)
from torch import Tensor

from moesaic.nn.ffn import FFNWeights

D, F = 64, 96
GATED, PLAIN = Shape(D, F), Shape(D, F, gated=False)


def weights(gated: bool = True, seed: int = 0) -> FFNWeights:
    """A random FFN in fp32, biases where there is no gate."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 8

    biases = {} if gated else {"up_bias_F": normal(F), "down_bias_D": normal(D)}
    return FFNWeights(normal(F, D), normal(D, F), "silu", normal(F, D) if gated else None, **biases)


@pytest.fixture(name="x_TD")
def inputs() -> Tensor:
    return torch.randn(40, D, generator=torch.Generator().manual_seed(1))


# costs


def test_bytes_are_those_that_can_be_counted() -> None:
    """By hand, in bits per weight of the dense FFN, three matrices of D F weights with 16 bits each."""
    dense = 3 * D * F * 16
    router = 2 * D * F * (4 + 2 * 16 / 64) + 32 * F
    assert cost.low_bit(GATED, Used(neurons=0.5), 4, 64).bytes == pytest.approx(router / dense + 0.5)
    staged = 2 * 8 * (D + F) * 16 + 2 * D * F * (4 + 2 * 16 / 64) / 2 + 32 * F
    assert cost.staged(GATED, Used(neurons=0.25), 4, 64, 8, 0.5).bytes == pytest.approx(staged / dense + 0.25)
    always = 2 * D * F * (4 + 16 / 64) + 32 * F
    chosen = 2 * D * F * 4 + D * F * (8 + 16 / 64)
    assert cost.nested(GATED, Used(neurons=0.25), 64).bytes == pytest.approx((always + chosen / 4) / dense)
    assert cost.weight_only(8, 64, symmetric=True).bytes == pytest.approx((8 + 16 / 64) / 16)
    assert cost.weight_only(4, 32, symmetric=False).bytes == pytest.approx((4 + 32 / 32) / 16)
    teal = cost.teal(GATED, Used(inputs=0.6, neurons=0.3))
    assert teal.bytes == pytest.approx((2 * 0.6 + 0.3) / 3)
    assert cost.cats(GATED, Used(neurons=0.5)).bytes == pytest.approx((1 + 2 * 0.5) / 3)
    assert cost.with_router(Used(neurons=0.5), 0.01).bytes == pytest.approx(0.52)  # fp32 beside bf16


def test_an_ffn_without_a_gate_has_two_matrices() -> None:
    dense = 2 * D * F * 16
    router = D * F * (3 + 2 * 16 / 32) + 32 * F
    assert cost.low_bit(PLAIN, Used(neurons=0.5), 3, 32).bytes == pytest.approx(router / dense + 0.5)
    assert cost.low_bit(PLAIN, Used(neurons=0.5), 3, 32).macs == pytest.approx(0.5 + 0.5)
    assert cost.teal(PLAIN, Used(inputs=0.5, neurons=0.25)).macs == pytest.approx(0.375)


def test_nothing_left_out_costs_what_the_whole_costs() -> None:
    whole = cost.nested(GATED, Used(), 64).bytes - GATED.norm
    assert whole == pytest.approx(cost.weight_only(8, 64, symmetric=True).bytes)
    assert cost.teal(GATED, Used()).bytes == cost.cats(GATED, Used()).bytes == pytest.approx(1)


# grids


@pytest.mark.parametrize("columns", [64, 70])
def test_rounding_to_nearest_errs_by_half_a_step(columns: int) -> None:
    w_RC = torch.randn(9, columns, generator=torch.Generator().manual_seed(2))
    for grid in (grids.symmetric(w_RC, 32), grids.asymmetric(w_RC, 4, 32)):
        step_RC = grid.scale_RG1.expand_as(grid.codes_RGN).flatten(1)[:, :columns]
        error_RC = (grid.decoded() - w_RC).abs()
        assert grid.decoded().shape == w_RC.shape
        assert bool((error_RC <= 0.5 * step_RC + 0.02).all())  # and what bf16 cuts from scale and offset
        assert float(error_RC.mean()) > 0.1 * float(step_RC.mean())


def test_the_high_nibble_leaves_sixteen_codes_open() -> None:
    grid = grids.symmetric(torch.randn(5, 64, generator=torch.Generator().manual_seed(3)), 64)
    apart = (grids.high_nibble(grid) - grid.decoded()) / grid.scale_RG1[:, 0]
    assert float(apart.min()) >= -7.001
    assert float(apart.max()) <= 8.001


@pytest.mark.parametrize("importance", [False, True])
def test_least_squares_err_less_than_the_range(importance: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    w_RC = torch.randn(20, 64, generator=generator)
    importance_C = torch.rand(64, generator=generator) ** 3 if importance else torch.ones(64)

    def error(grid: grids.Grid) -> float:
        return float(((grid.decoded() - w_RC).square() * importance_C).sum())

    fitted = grids.least_squares(w_RC, 2, 32, importance_C if importance else None)
    assert error(fitted) < 0.8 * error(grids.asymmetric(w_RC, 2, 32))
    assert set(fitted.codes_RGN.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_noise_is_one_step_wide() -> None:
    w_RC = torch.linspace(0, 15, 32)[None].repeat(50, 1)  # a 4-bit grid of step 1
    noise_RC = grids.with_noise(w_RC, 32, torch.Generator().manual_seed(5)) - w_RC
    assert float(noise_RC.abs().max()) <= 0.5
    assert float(noise_RC.std()) == pytest.approx(12**-0.5, rel=0.1)


# references


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "reference",
    [
        Reference(),
        Scored(active=1.0),
        LowBit(active=1.0),
        LowBit(active=1.0, choice="threshold", grid="inputs"),
        Teal(active=1.0),
    ],
    ids=str,
)
def test_with_everything_active_it_is_the_dense_ffn(gated: bool, reference: Reference, x_TD: Tensor) -> None:
    dense = weights(gated)
    ffn = reference.fit(dense, x_TD)
    assert torch.equal(ffn(x_TD), dense(x_TD))
    assert ffn.tally.used() == Used()


def test_nested_with_all_neurons_is_int8(x_TD: Tensor) -> None:
    dense = weights()
    whole = Nested(active=1.0).fit(dense, x_TD)(x_TD)
    error = float((whole - dense(x_TD)).norm() / dense(x_TD).norm())
    assert 1e-4 < error < 0.02


@pytest.mark.parametrize("kind", [Scored, LowBit, Nested, Staged])
def test_the_neurons_that_write_everything_are_found(kind: type[Scored], x_TD: Tensor) -> None:
    """A quarter of the columns of the down projection is large, the rest next to nothing."""
    planted_F = torch.arange(F) % 4 == 1
    dense = weights()
    dense = replace(dense, down_DF=dense.down_DF * torch.where(planted_F, 1.0, 1e-6))
    ffn = kind(active=0.25).fit(dense, x_TD)
    used_TF = ffn.masked(x_TD) != 0
    assert bool((used_TF == planted_F).all())
    assert ffn.tally.used().neurons == pytest.approx(0.25)


def test_candidates_of_all_neurons_are_chosen_by_low_bits_alone(x_TD: Tensor) -> None:
    dense = weights()
    one, two = (own.fit(dense, x_TD) for own in (LowBit(active=0.25), Staged(active=0.25, candidates=1.0, rank=1)))
    assert torch.equal(one(x_TD), two(x_TD))
    few = Staged(active=0.25, candidates=0.25, rank=1).fit(dense, x_TD)
    assert not torch.equal(one(x_TD), few(x_TD))


def test_a_low_rank_errs_least_on_the_inputs_that_it_was_made_for(x_TD: Tensor) -> None:
    w_FD = weights().up_FD
    skewed_TD = x_TD * torch.linspace(0.01, 3, D)
    u_FD, s_D, v_DD = torch.linalg.svd(w_FD, full_matrices=False)
    plain_FD = (u_FD[:, :4] * s_D[:4]) @ v_DD[:4]
    own_FD = low_rank(w_FD, skewed_TD, 4)
    assert int(torch.linalg.matrix_rank(own_FD)) == 4
    wanted_TF = skewed_TD @ w_FD.T
    own, plain = (float((skewed_TD @ made_FD.T - wanted_TF).norm()) for made_FD in (own_FD, plain_FD))
    assert own < 0.9 * plain


def test_the_product_chooses_what_the_reference_chooses(x_TD: Tensor) -> None:
    """On weights that every grid holds exactly; then in a bf16 model, by a threshold, the share that was asked for."""
    generator = torch.Generator().manual_seed(7)
    coarse = {
        name: torch.randint(0, 16, t.shape, generator=generator) / 8 - 1 for name, t in weights().tensors().items()
    }
    coarse = {
        name: torch.where(
            torch.arange(t.shape[1]) % 32 < 2, torch.tensor([-1.0, 0.875])[torch.arange(t.shape[1]) % 2], t
        )
        for name, t in coarse.items()
    }
    dense = replace(weights(), **coarse)
    ours, reference = (kind(active=0.25).fit(dense, x_TD).masked(x_TD) for kind in (Product, LowBit))
    assert float(((ours != 0) == (reference != 0)).float().mean()) > 0.999
    dense = weights().to(torch.bfloat16)
    ffn = Product(active=0.5, choice="threshold").fit(dense, x_TD.bfloat16())
    ffn(x_TD.bfloat16())
    assert ffn.tally.used().neurons == pytest.approx(0.5, abs=0.02)


def test_every_token_has_neurons_of_its_own(x_TD: Tensor) -> None:
    """Better than the best fixed set: what a choice by token is for."""
    dense = weights()
    want = dense(x_TD)
    h_TF = dense.hidden(x_TD)
    fixed_F = (h_TF.square().mean(0) * dense.down_DF.square().sum(0)).topk(F // 2).indices
    static = h_TF[:, fixed_F] @ dense.down_DF[:, fixed_F].T
    errors = [float((ref.fit(dense, x_TD)(x_TD) - want).norm()) for ref in (Scored(), LowBit(), LowBit(bits=2))]
    assert errors == sorted(errors)
    assert errors[-1] < float((static - want).norm())


def test_teal_drops_small_inputs_and_small_activations() -> None:
    generator = torch.Generator().manual_seed(6)
    dense = weights()
    x_TD = torch.randn(64, D, generator=generator)
    x_TD[:, ::2] *= 1e-7
    dense = replace(dense, up_FD=dense.up_FD * torch.where(torch.arange(F) < F // 2, 1.0, 1e-7)[:, None])
    ffn = Teal(active=0.5).fit(dense, x_TD)
    torch.testing.assert_close(ffn(x_TD), dense(x_TD), atol=1e-5, rtol=1e-4)
    used = ffn.tally.used()
    assert used.inputs == pytest.approx(0.5)
    assert used.neurons == pytest.approx(0.5, abs=0.01)


def test_cats_keeps_what_the_gate_opens(x_TD: Tensor) -> None:
    dense = weights()
    open_F = torch.arange(F) < F // 4
    gate_bias_F = torch.where(open_F, 3.0, -40.0)  # silu(-40) is nothing
    dense = replace(dense, gate_bias_F=gate_bias_F)
    ffn = Cats(active=0.25).fit(dense, x_TD)
    assert bool(((ffn.masked(x_TD) != 0) == open_F).float().mean() > 0.99)
    torch.testing.assert_close(ffn(x_TD), dense(x_TD), atol=0.02, rtol=0.02)


def test_a_threshold_means_the_share_that_was_asked_for(x_TD: Tensor) -> None:
    ffn = LowBit(active=0.3, choice="threshold").fit(weights(), x_TD)
    per_token_T = (ffn.masked(x_TD) != 0).float().mean(dim=1)
    assert float(per_token_T.mean()) == pytest.approx(0.3, abs=0.01)
    assert float(per_token_T.std()) > 0.01  # hard tokens get more


def test_largest_takes_exactly_so_many_also_of_equal_ones() -> None:
    score_TF = torch.zeros(3, 10)
    score_TF[0, 7] = 1
    for keep in (1, 3, 5, 8, 10):
        mask_TF = largest(score_TF, keep)
        assert mask_TF.sum(dim=1).tolist() == [keep] * 3
        assert bool(mask_TF[0, 7])


def test_quantile_is_the_value_above_which_the_share_is() -> None:
    values = torch.arange(100.0)
    assert quantile(values, 0.25) == 75
    assert quantile(values, 1.0) == -torch.inf
    assert quantile(values, 0.0) == torch.inf
