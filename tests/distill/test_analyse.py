"""Gains by interpolation, and which training counts."""

from __future__ import annotations

from typing import Any

import pytest

from moesaic.distill.analyse import best_students, fvu_at, width_of
from moesaic.distill.config import DistillConfig, trials
from moesaic.distill.spec import StudentSpec

CURVE = [(10.0, 0.4), (40.0, 0.1), (160.0, 0.025)]  # FVU = 4 / width


def trial(spec: StudentSpec, fvu: float | None, rate: float = 1e-3, validation: float | None = None) -> dict[str, Any]:
    found = {"law": "real", "spec": spec.model_dump(mode="json"), "rate": rate, "epoch": 3, "fvu": fvu}
    return {**found, "validation": fvu if validation is None else validation}


def test_interpolation_is_straight_in_logarithms_and_never_leaves_the_curve() -> None:
    assert width_of(0.2, CURVE) == pytest.approx(20)
    assert fvu_at(80, CURVE) == pytest.approx(0.05)
    assert width_of(0.4, CURVE) == pytest.approx(10)
    assert width_of(0.5, CURVE) is None
    assert width_of(0.02, CURVE) is None
    assert fvu_at(161, CURVE) is None


def test_the_rate_of_least_validation_fvu_counts_and_diverged_runs_do_not() -> None:
    dense = [trial(StudentSpec(shared=int(width)), fvu) for width, fvu in CURVE]
    moe = StudentSpec(shared=5, experts=100, top_k=5, rank=4)
    runs = [trial(moe, 0.3, 1e-4, 0.2), trial(moe, 0.1, 1e-3, 0.3), trial(moe, None, 1e-2)]
    (row,) = [row for row in best_students(dense + runs, d_model=16) if row["spec"]["experts"]]
    assert (row["fvu"], row["rate"]) == (0.3, 1e-4)
    assert row["gain"] == pytest.approx((4 / 0.3) / 10)
    assert row["router_macs"] == 4 * 116
    assert row["equal_macs"]["width"] == pytest.approx(10 + 464 / 32)
    assert row["equal_macs"]["ratio"] == pytest.approx(0.3 * 24.5 / 4)


def test_a_sweep_has_each_training_once() -> None:
    config = DistillConfig(routers=("full", "low_rank"), ranks=(None, 16), pairs=((8, 8), (8, 8)), experts=(4, 100))
    found = trials(config, 64)
    assert len({t.name() for t in found}) == len(found)
    moe = {t.spec for t in found if t.spec is not None and not t.spec.dense}
    assert {(s.router, s.rank, s.experts) for s in moe} == {("full", 0, 100), ("low_rank", 16, 100)}
    assert sum(t.spec is None for t in found) == 2 * 3
