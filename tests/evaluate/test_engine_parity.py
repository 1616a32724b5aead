"""Figures and bounds of a comparison with another engine."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.errors import VerificationError
from moesaic.evaluate.differences import Differences, logit_differences
from moesaic.evaluate.engine_parity import EXCUSED, WINDOW, WINDOWS, EngineParity


def test_figures_of_known_distributions() -> None:
    expected_WV = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    actual_WV = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()
    parity = EngineParity.of(logit_differences(expected_WV, actual_WV), engine="x 1.0", candidates=2, windows=1)
    assert (parity.engine, parity.tokens, parity.candidates, parity.top1) == ("x 1.0", 2, 2, 0.5)
    assert parity.max_delta == pytest.approx(math.log(9), rel=1e-5)
    assert parity.mean_kl == pytest.approx(0.8 * math.log(9) / 2, rel=1e-5)
    assert (parity.windows, parity.window_median, parity.window_kl) == (1, parity.median, parity.mean_kl)


def of_windows(delta_NW: torch.Tensor, kl_NW: torch.Tensor | None = None) -> EngineParity:
    """Windows of the given differences; without ``kl_NW``, with the divergences that go with them."""
    kl_NW = delta_NW**2 if kl_NW is None else kl_NW
    found = Differences(delta_NW.flatten(), torch.ones(delta_NW.numel(), dtype=torch.bool), kl_NW.flatten())
    return EngineParity.of(found, engine="x 1.0", candidates=10, windows=len(delta_NW))


def judged(parity: EngineParity) -> bool:
    try:
        parity.require_exact("folder")
    except VerificationError:
        return False
    return True


@pytest.mark.parametrize(
    ("median", "kl", "passes"),
    [(1e-5, 1e-8, True), (1e-2, 1e-8, False), (1e-5, 1e-2, False), (math.inf, 0.0, False), (0.0, math.nan, False)],
)
def test_bounds(median: float, kl: float, passes: bool) -> None:
    parity = of_windows(torch.full((WINDOWS, WINDOW), median), torch.full((WINDOWS, WINDOW), kl))
    assert judged(parity) == passes
    if not passes:
        with pytest.raises(VerificationError, match=r"folder in x 1\.0 differs in more than 2 of 8 windows"):
            parity.require_exact("folder")


@pytest.mark.parametrize(("windows", "excused"), [(1, 0), (3, 0), (4, 1), (8, 2), (32, 8)])
def test_one_window_in_four_may_be_disturbed_from_its_first_tokens_on(windows: int, excused: int) -> None:
    assert windows // EXCUSED == excused
    for disturbed in (excused, excused + 1):
        delta_NW = torch.full((windows, WINDOW), 1e-5)
        delta_NW[:disturbed, 2:] = 1.0
        parity = of_windows(delta_NW)
        assert judged(parity) == (disturbed == excused)
        # Of all positions, as ever.
        assert parity.mean_kl == pytest.approx(disturbed / windows * (1 - 2 / WINDOW), rel=1e-4, abs=1e-9)
    late_NW = torch.full((windows, WINDOW), 1e-5)
    late_NW[:, -1] = 0.5  # one token of each window
    assert not judged(of_windows(late_NW))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_never_excused(value: float) -> None:
    zeros_NW = torch.zeros(WINDOWS, WINDOW)
    odd_NW = zeros_NW.clone()
    odd_NW[0, 5] = value
    assert judged(of_windows(zeros_NW))
    assert not judged(of_windows(zeros_NW, odd_NW))
    assert not judged(of_windows(odd_NW, zeros_NW))
