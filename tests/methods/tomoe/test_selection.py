from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import InputError
from moesaic.methods.tomoe.samplers import MEDIAN, on_probability
from moesaic.methods.tomoe.selection import active_width, choose_masks, expected_shift


def logits_of(seed: int, experts: int = 4, widths: tuple[int, ...] = (37, 37, 24)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(experts, width, generator=generator) + place for place, width in enumerate(widths)]


def cost_of(masks: list[Tensor], costs: list[float], top_k: int = 1) -> float:
    return sum(cost * active_width(mask.sum(-1), top_k) for mask, cost in zip(masks, costs, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0.1, 1.0),
    rule=st.sampled_from(["median", "expected"]),
    widths=st.sampled_from(["free", "layer"]),
    top_k=st.sampled_from([1, 2]),
)
def test_the_budget_is_met_to_the_last_neuron(seed: int, share: float, rule: str, widths: str, top_k: int) -> None:
    logits, costs = logits_of(seed), [96.0, 96.0, 64.0]
    budget = share * top_k * (2 * 96 * 37 + 64 * 24) + 5
    masks = choose_masks(logits, costs, budget, rule=rule, widths=widths, top_k=top_k)
    left = budget - cost_of(masks, costs, top_k)
    assert left >= 0
    full = all(active_width(mask.sum(-1), top_k) == top_k * mask.shape[1] for mask in masks)
    assert full or left < top_k * max(costs)
    assert all(bool(mask.any(-1).all()) for mask in masks)


@pytest.mark.parametrize("widths", ["free", "layer", "equal"])
def test_each_expert_keeps_its_largest_logits(widths: str) -> None:
    logits = logits_of(1)
    masks = choose_masks(logits, [1.0] * 3, 40.0, rule="median", widths=widths)
    for logits_NF, mask_NF in zip(logits, masks, strict=True):
        for logits_F, mask_F in zip(logits_NF, mask_NF, strict=True):
            assert float(logits_F[mask_F].min()) >= float(logits_F[~mask_F].max())
    counts = [set(mask.sum(-1).tolist()) for mask in masks]
    if widths == "equal":
        assert counts == [{13}] * 3
    elif widths == "layer":
        assert all(len(count) == 1 for count in counts)
        assert len({min(count) for count in counts}) > 1  # layers differ, as the logits do
    else:
        assert any(len(count) > 1 for count in counts)


def test_the_natural_widths_of_the_rules() -> None:
    logits = [torch.tensor([[MEDIAN - 0.3, MEDIAN + 0.1, MEDIAN - 0.1, -9.0, -9.0]])]
    assert choose_masks(logits, [1.0], 1.0, rule="median", widths="free")[0].tolist() == [
        [False, True, False, False, False]
    ]
    # Three neurons that are nearly half on each are one and a half in the mean.
    assert float(on_probability(logits[0], 0.0).sum()) == pytest.approx(1.4, abs=0.1)


def test_ties_go_to_the_lower_index_and_do_not_break_the_budget() -> None:
    logits = [torch.zeros(2, 10), torch.zeros(2, 10)]
    masks = choose_masks(logits, [1.0, 1.0], 9.0, rule="median", widths="layer")
    assert sum(int(mask.sum(-1).max()) for mask in masks) == 9
    for mask in masks:
        assert mask[0].tolist() == sorted(mask[0].tolist(), reverse=True)


def test_no_expert_is_empty_and_too_small_a_budget_is_refused() -> None:
    logits = [torch.tensor([[5.0] * 6, [-50.0] * 6])]
    masks = choose_masks(logits, [1.0], 4.0, rule="median", widths="free")
    assert masks[0].sum(-1).tolist() == [4, 1]
    with pytest.raises(InputError, match="less than one neuron"):
        choose_masks(logits, [1.0], 0.5, rule="median", widths="free")


def test_the_expected_cost_is_held() -> None:
    logits, weights = logits_of(2), [2.0, 1.0, 3.0]
    for target in (20.0, 100.0, 250.0):
        shift = expected_shift(logits, weights, target)
        found = sum(w * float(on_probability(x, shift).sum()) for w, x in zip(weights, logits, strict=True))
        assert found == pytest.approx(target, rel=2e-3)
        assert found <= target + 1e-6


@pytest.mark.parametrize("drift", [-40.0, 40.0])
def test_logits_that_all_drift_one_way_still_meet_the_budget(drift: float) -> None:
    logits = [x + drift for x in logits_of(2)]
    shift = expected_shift(logits, [1.0] * 3, 100.0)
    assert sum(float(on_probability(x, shift).sum()) for x in logits) == pytest.approx(100.0, rel=2e-3)


def test_a_budget_for_everything_turns_everything_on() -> None:
    logits = logits_of(2)
    shift = expected_shift(logits, [1.0] * 3, 1e9)
    assert all(bool((on_probability(x, shift) == 1).all()) for x in logits)
