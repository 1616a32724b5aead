"""Forecasts of time are corrected by what conversions took on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import moesaic
from moesaic.jobs import pace
from moesaic.paths import cache_folder

OPTIONS = {"layout": "S3A3E8"}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pace, "FEWEST_SECONDS", 0.0)


def plan(folder: Path, method: str = "random") -> moesaic.jobs.plan.PlanReport:
    return moesaic.plan(folder, method=method, options=OPTIONS)


def test_a_conversion_corrects_the_forecasts_of_its_method(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    dense = tiny("llama")
    before = plan(dense)
    assert not any("corrected" in remark for remark in before.remarks)
    done = moesaic.convert(dense, tmp_path / "out", method="random", options=OPTIONS)
    after = plan(dense)
    assert after.seconds == pytest.approx(done.results["conversion"]["seconds"], rel=0.02, abs=0.06)
    assert "the time is corrected by how long random took here before" in after.remarks
    assert not any("corrected" in remark for remark in plan(dense, "llama_moe").remarks)


def test_a_short_or_resumed_conversion_or_that_of_a_blueprint_corrects_nothing(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny("llama")
    with monkeypatch.context() as patched:
        patched.setattr(pace, "FEWEST_SECONDS", 1e6)
        moesaic.convert(dense, tmp_path / "short", method="random", options=OPTIONS)
    moesaic.convert(dense, tmp_path / "given", blueprint=tmp_path / "short")
    with monkeypatch.context() as patched:
        patched.setattr("moesaic.jobs.convert.finish", _stopped)
        with pytest.raises(KeyboardInterrupt):
            moesaic.convert(dense, tmp_path / "out", method="random", options=OPTIONS)
    moesaic.convert(dense, tmp_path / "out", method="random", options=OPTIONS)
    assert not list(cache_folder().glob("pace.json"))


def _stopped(*_: object) -> None:
    raise KeyboardInterrupt


def test_other_work_that_slowed_one_conversion_down_does_not_count(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    dense = tiny("llama")
    moesaic.convert(dense, tmp_path / "out", method="random", options=OPTIONS)
    file = cache_folder() / "pace.json"
    known = json.loads(file.read_text())
    (kind,) = known[pace._machine()]
    assert kind == "random on auto"
    usual = plan(dense).seconds
    known[pace._machine()][kind] *= 2
    known[pace._machine()][kind].append(1e6)
    file.write_text(json.dumps(known))
    assert plan(dense).seconds == usual


def test_a_cache_that_cannot_be_written_costs_no_conversion(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    (cache_folder() / "pace.json").mkdir(parents=True)
    moesaic.convert(tiny("llama"), tmp_path / "out", method="random", options=OPTIONS)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{",
        '{"a": 1}',
        '{"MACHINE": {"random on auto": 0.5}}',
        '{"MACHINE": {"random on auto": ["fast", -1.0]}}',
    ],
)
def test_a_damaged_file_is_as_none(text: str, tiny: Callable[[str], Path]) -> None:
    dense = tiny("llama")
    before = plan(dense)
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / "pace.json").write_text(text.replace("MACHINE", pace._machine()))
    assert plan(dense) == before


def test_other_machines_keep_their_own(tiny: Callable[[str], Path]) -> None:
    dense = tiny("llama")
    before = plan(dense)
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / "pace.json").write_text(json.dumps({"another CPU, 64 cores": {"random on auto": [0.1]}}))
    assert plan(dense) == before
