from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesaic.solvers.compensation import (
    Factor,
    Which,
    channel_compensation,
    compensation,
    kept_branches,
    least_squares_factor,
)

CLIP = (1.0, 4.0)


def independent_branches(energies: Tensor, samples: int = 400_000) -> Tensor:
    """Zero-mean independent outputs [N, samples] with the given mean squares."""
    noise = torch.randn(len(energies), samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise * energies.sqrt().unsqueeze(1)


@pytest.mark.parametrize(
    ("which", "expected"),
    [("last", [0, 1, 2]), ("strided", [0, 2, 5]), ("low_energy", [1, 4, 7])],
)
def test_which_branches_stay(which: Which, expected: list[int]) -> None:
    energies = torch.tensor([1.0, 9.0, 2.0, 3.0, 8.0, 0.0, 5.0, 7.0])
    assert kept_branches(which, energies, 3, torch.Generator()) == expected


def test_low_energy_drops_the_later_of_equal_branches() -> None:
    assert kept_branches("low_energy", torch.ones(5), 2, torch.Generator()) == [0, 1]


def test_random_branches_are_distinct_ascending_and_fixed_by_the_seed() -> None:
    draws = [kept_branches("random", torch.ones(20), 7, torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]
    assert all(draw == sorted(set(draw)) and len(draw) == 7 for draw in draws)


@pytest.mark.parametrize("which", ["last", "strided", "low_energy", "random"])
def test_keeping_all_keeps_all(which: Which) -> None:
    assert kept_branches(which, torch.rand(9), 9, torch.Generator()) == list(range(9))


@pytest.mark.parametrize("factor", ["sqrt", "energy", "ratio", "none"])
def test_all_branches_need_no_compensation(factor: Factor) -> None:
    assert compensation(factor, torch.tensor([1.0, 2.0, 5.0]), [0, 1, 2], CLIP) == 1.0


def test_variance_after_compensation() -> None:
    outputs = independent_branches(torch.ones(8, dtype=torch.float64))
    energies = torch.ones(8)
    kept = [0, 2, 3, 5, 6]

    def variance_ratio(factor: Factor) -> float:
        c = compensation(factor, energies, kept, CLIP)
        return float((c * outputs[kept].sum(dim=0)).var() / outputs.sum(dim=0).var())

    assert variance_ratio("sqrt") == pytest.approx(1.0, rel=0.05)
    assert variance_ratio("ratio") == pytest.approx(8 / 5, rel=0.05)
    assert variance_ratio("none") == pytest.approx(5 / 8, rel=0.05)


def test_energy_factor_restores_the_variance_of_unequal_branches() -> None:
    energies = torch.tensor([4.0, 0.5, 1.0, 9.0, 0.1, 2.0], dtype=torch.float64)
    outputs = independent_branches(energies)
    kept = [0, 3, 5]
    c = compensation("energy", energies, kept, CLIP)
    assert float((c * outputs[kept].sum(dim=0)).var() / outputs.sum(dim=0).var()) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize(
    ("keep", "shares"),
    [(6, {1.0: 0.25, "sqrt": 0.274, "ratio": 1 / 3}), (4, {1.0: 0.5, "sqrt": 0.586, "ratio": 1.0})],
)
def test_error_share_is_one_minus_a_plus_a_times_c_minus_one_squared(
    keep: int, shares: dict[float | str, float]
) -> None:
    outputs = independent_branches(torch.ones(8, dtype=torch.float64))
    total = outputs.sum(dim=0)
    part = outputs[:keep].sum(dim=0)
    for factor, expected in shares.items():
        c = 1.0 if factor == 1.0 else {"sqrt": math.sqrt(8 / keep), "ratio": 8 / keep}[str(factor)]
        share = float((total - c * part).square().mean() / total.square().mean())
        a = keep / 8
        assert share == pytest.approx((1 - a) + a * (c - 1) ** 2, abs=0.01)
        assert share == pytest.approx(expected, abs=0.01)
    assert least_squares_factor([(total, part)]) == pytest.approx(1.0, abs=0.01)


def test_least_squares_factor_is_the_minimum_and_adds_up_over_batches() -> None:
    generator = torch.Generator().manual_seed(1)
    dense, pruned = (torch.randn(50, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    dense = dense + 1.7 * pruned
    c = least_squares_factor(zip(dense.split(7), pruned.split(7), strict=True))
    solution = torch.linalg.lstsq(pruned.reshape(-1, 1), dense.reshape(-1, 1)).solution
    assert c == pytest.approx(float(solution), rel=1e-12)
    assert least_squares_factor([(dense, torch.zeros_like(dense))]) == 1.0


def test_factors_are_clipped_and_none_is_not() -> None:
    energies = torch.tensor([1.0, 0.0, 0.0])
    assert compensation("ratio", torch.ones(10), [0], CLIP) == 4.0
    assert compensation("sqrt", torch.ones(10), [0], (1.0, 2.0)) == 2.0
    assert compensation("none", torch.ones(10), [0], (2.0, 4.0)) == 1.0
    assert compensation("energy", energies, [1, 2], CLIP) == 1.0  # nothing is left to scale


def test_channel_factors_restore_each_coordinate_and_leave_empty_ones_alone() -> None:
    total, kept = torch.tensor([8.0, 3.0, 100.0, 5.0, 0.0]), torch.tensor([2.0, 3.0, 1.0, 0.0, 0.0])
    assert channel_compensation(total, kept, CLIP).tolist() == [2.0, 1.0, 4.0, 1.0, 1.0]
