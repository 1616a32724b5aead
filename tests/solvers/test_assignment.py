from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moesaic.solvers.assignment import balanced_assignment

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def draw_costs(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(costs: Tensor, labels: Tensor) -> float:
    return costs.gather(1, labels[:, None]).sum().item()


def lapjv_optimum(costs: Tensor, capacities: list[int]) -> float:
    owner = np.repeat(np.arange(len(capacities)), capacities)
    row, column = linear_sum_assignment(costs.double().numpy()[:, owner])
    return total(costs.double(), torch.from_numpy(owner[column][np.argsort(row)]))


@settings(max_examples=40, deadline=None)
@given(capacities=SIZES, seed=st.integers(0, 999), exponent=st.integers(-300, 300))
def test_real_costs_of_any_size_reach_the_optimum_of_lapjv(capacities: list[int], seed: int, exponent: int) -> None:
    costs = draw_costs(sum(capacities), len(capacities), seed) * 10.0**exponent
    labels = balanced_assignment(costs, capacities)
    assert torch.bincount(labels, minlength=len(capacities)).tolist() == capacities
    expected = lapjv_optimum(costs, capacities)
    assert total(costs, labels) == pytest.approx(expected, rel=1e-9, abs=1e-9 * 10.0**exponent)


@settings(max_examples=40, deadline=None)
@given(capacities=SIZES, seed=st.integers(0, 999))
def test_integer_costs_with_ties_are_exact_and_no_worse_than_random(capacities: list[int], seed: int) -> None:
    costs = (draw_costs(sum(capacities), len(capacities), seed) * 2).long()
    labels = balanced_assignment(costs, capacities)
    assert torch.bincount(labels, minlength=len(capacities)).tolist() == capacities
    assert total(costs, labels) == lapjv_optimum(costs, capacities)
    generator = torch.Generator().manual_seed(seed)
    random = torch.arange(len(capacities)).repeat_interleave(torch.tensor(capacities))
    random = random[torch.randperm(len(random), generator=generator)]
    assert total(costs, labels) <= total(costs, random)


def test_small_differences_beside_a_large_common_cost_count() -> None:
    # 1e6 is common to a row and must not use up the precision of the integer costs.
    costs = torch.tensor([[1e6, 1e6 + 1e-6], [3e6, 3e6 + 2e-6]], dtype=torch.float64)
    assert balanced_assignment(costs, [1, 1]).tolist() == [1, 0]


def test_balance_forces_rows_away_from_their_best_column() -> None:
    # All rows like column 0; those that lose least must leave.
    costs = torch.tensor([[0.0, 5.0], [0.0, 1.0], [0.0, 9.0], [0.0, 2.0]])
    assert balanced_assignment(costs, [2, 2]).tolist() == [0, 1, 0, 1]


def test_ties_and_repeats_give_the_same_labels() -> None:
    costs = draw_costs(500, 7, 0).round()
    first = balanced_assignment(costs, [72] * 3 + [71] * 4)
    assert all(torch.equal(first, balanced_assignment(costs.clone(), [72] * 3 + [71] * 4)) for _ in range(3))


def test_thousands_of_rows_meet_the_optimum() -> None:
    capacities = [400, 401, 399]
    costs = draw_costs(1200, 3, 5).float()
    assert total(costs.double(), balanced_assignment(costs, capacities)) == pytest.approx(
        lapjv_optimum(costs, capacities), rel=1e-12
    )


@pytest.mark.parametrize("columns", [1, 3])
def test_nothing_to_assign(columns: int) -> None:
    labels = balanced_assignment(torch.zeros(0, columns), [0] * columns)
    assert labels.shape == (0,)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("costs", "capacities", "message"),
    [
        (torch.zeros(4, 2), [2, 1], "sum to the 4 rows"),
        (torch.zeros(4, 2), [5, -1], "must be >= 0"),
        (torch.zeros(4, 2), [2, 1, 1], "3 capacities"),
        (torch.zeros(4), [4], "shape"),
        (torch.tensor([[0.0, float("nan")]]), [1, 0], "NaN"),
        (torch.tensor([[0.0, float("inf")]]), [1, 0], "Inf"),
    ],
)
def test_problems_without_a_meaning_are_refused(costs: Tensor, capacities: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_assignment(costs, capacities)
