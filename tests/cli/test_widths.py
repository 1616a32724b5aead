"""What the command line says of experts of different widths."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moesaic
from moesaic.cli.main import main


def said(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["moesaic", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    return capsys.readouterr().out


def test_plan_inspect_and_card(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out = tiny("llama"), tmp_path / "out"
    options = {"split": "union", "experts": 4, "active": 0.5}
    values = [f"--set={name}={value}" for name, value in options.items()]
    planned = said(["plan", str(dense), "--method", "token_clusters", *values], monkeypatch, capsys)
    assert "4 routed experts of 18 neurons in the mean over tokens; a token uses 1" in planned
    calibration = {"tokens": 512, "window": 64}
    made = moesaic.convert(dense, out, method="token_clusters", options=options, calibration=calibration)
    rows = json.loads(said(["inspect", str(out), "--json"], monkeypatch, capsys))["sites"]
    for row, plan in zip(rows, made.blueprint.sites.values(), strict=True):
        widths = sorted(len(expert) for expert in plan.experts)
        assert row["width"] == f"{widths[0]}-{widths[-1]}"
    assert "4 experts of different widths" in (out / "README.md").read_text()
    said(["verify", str(out), "--baseline", str(dense)], monkeypatch, capsys)


def test_plan_says_what_an_alignment_costs(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = str(tiny("llama"))
    planned = said(
        ["plan", dense, "--method", "token_clusters", "--align", "8", "--set=experts=4"], monkeypatch, capsys
    )
    assert "routed experts of 16 neurons; a token uses 1" in planned
    padded = said(["plan", dense, "--router", "oracle", "--align", "256"], monkeypatch, capsys)
    assert "pads each expert by" in padded
    assert "width 32 is no multiple of 256" in padded
