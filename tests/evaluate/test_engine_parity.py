"""Figures and bounds of a comparison with another engine."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.errors import VerificationError
from moesaic.evaluate.differences import logit_differences
from moesaic.evaluate.engine_parity import EngineParity


def test_figures_of_known_distributions() -> None:
    expected_WV = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    actual_WV = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()
    parity = EngineParity.of(logit_differences(expected_WV, actual_WV), engine="x 1.0", candidates=2)
    assert (parity.engine, parity.tokens, parity.candidates, parity.top1) == ("x 1.0", 2, 2, 0.5)
    assert parity.max_delta == pytest.approx(math.log(9), rel=1e-5)
    assert parity.mean_kl == pytest.approx(0.8 * math.log(9) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("median", "mean_kl", "passes"),
    [(1e-5, 1e-8, True), (1e-2, 1e-8, False), (1e-5, 1e-2, False), (math.inf, 0.0, False), (0.0, math.nan, False)],
)
def test_bounds(median: float, mean_kl: float, passes: bool) -> None:
    parity = EngineParity("x 1.0", 300, 10, 5.0, median, 0.9, mean_kl)
    if passes:
        parity.require_exact("folder")
    else:
        with pytest.raises(VerificationError, match=r"folder in x 1\.0 differs"):
            parity.require_exact("folder")
