"""The budgets of one conversion, from a comparison on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.compare import measure
from benchmarks.compare.__main__ import main

from benchmarks import budgets
from moesaic.calibration.samples import sample_text
from tests.tiny_models import build_tiny


def test_other_budgets_of_kept_conversions_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = sample_text("tiny")[:20_000]
    monkeypatch.setattr(measure, "evaluation_text", lambda: text)  # a small tokenizer takes seconds for the test split
    monkeypatch.setattr(measure, "sample_text", lambda name: sample_text(name)[:20_000])
    for name in ("evaluation_text", "sample_text"):
        monkeypatch.setattr(budgets, name, getattr(measure, name))
    dense, work, results = build_tiny("llama", tmp_path / "tiny", d_ff=64), tmp_path / "work", tmp_path / "results"
    common = ["--threads", "1", "--results", str(results)]
    asked = [
        "--fractions",
        "75",
        "60",
        "55",
        "--only",
        "union-lead",
        "refit-lead",
        "--tokens",
        "2048",
        "--window",
        "64",
    ]
    main(
        [str(dense), str(work), *asked, "--windows", "4", "--leading", "1", "--keep", *common],
        lambda *given: measure.measure(*given),
    )
    cases = ("union-lead@75", "union-lead@55")
    monkeypatch.setattr(
        "sys.argv",
        [
            "budgets",
            str(work),
            "--cases",
            *cases,
            "--budgets",
            "90",
            "60",
            "--tokens",
            "2048",
            "--results",
            str(results),
        ],
    )
    budgets.main()
    rows = json.loads((results / "budgets_tiny.json").read_text())["rows"]
    assert [(row["case"], row["text"], row["asked"]) for row in rows] == [
        (case, text, asked) for case in cases for text in measure.TEXTS for asked in (None, 0.9, 0.6)
    ]
    for planned, more, less in (rows[:3], rows[3:6]):
        assert less["used"] < planned["used"] < more["used"]
        assert less["used"] == pytest.approx(0.6, abs=0.05)  # one of two layers is dense
        assert less["over_control"]["ratio"] > 0
        assert more["over_control"] is None
    page = (results / "budgets_tiny.md").read_text()
    assert page.count("\n| ") == 13
    assert str(tmp_path) not in page
    assert not (work / "budget").exists()
    capsys.readouterr()
    refusals = (  # each before the first conversion
        (
            [str(work), "--cases", "union-lead@75", "union-lead@10", "--budgets", "90"],
            "has no conversion union-lead@10",
        ),
        ([str(work), "--cases", "refit-lead@75"], "routes nothing"),
        ([str(work), "--cases", "union-lead@75", "--budgets", "90", "40"], "less than the dense layers"),
        ([str(results)], "protocol.json is missing"),
    )
    for more, message in refusals:
        monkeypatch.setattr("sys.argv", ["budgets", *more, "--tokens", "2048"])
        with pytest.raises(SystemExit):
            budgets.main()
        assert message in capsys.readouterr().err
    assert (results / "budgets_tiny.md").read_text() == page
