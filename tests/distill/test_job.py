"""The sweep as a job: complete, resumable, the same in one process and in two; bad input is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from moesaic.calibration.text import build_windows
from moesaic.distill.config import DistillConfig, Trial, trials
from moesaic.distill.sweep import run_trial
from moesaic.errors import InputError, MoesaicError
from moesaic.jobs import distill as job
from moesaic.jobs.distill import Distilled, distill
from moesaic.jobs.distill_request import check_distill
from moesaic.progress import Silent

SMALL = {
    "pairs": [[4, 4], [0, 8]],
    "experts": [24],
    "routers": ["low_rank", "full", "product"],
    "dense_widths": [4, 16],
    "rates": [1e-3, 1e-2],
    "epochs": 2,
    "batch": 64,
    "probe": {"atoms": 2, "top_k": [2, 6]},
    "data": {"sources": "tiny", "tokens": 1280, "window": 64, "compute_dtype": "float32"},
}


def config(**changes: object) -> DistillConfig:
    return DistillConfig.model_validate(SMALL | changes)


@pytest.fixture(scope="module")
def swept(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    return distill(tiny("llama"), 1, tmp_path_factory.mktemp("lab") / "out", config=config())


def test_output_has_every_student_under_both_laws_with_all_costs(swept: Distilled) -> None:
    rows = swept.results["students"]
    assert len(rows) == 2 * (2 + 2 * 3)
    assert len(swept.results["trials"]) == 2 * len(rows) + 4
    for row in rows:
        assert 0 < row["fvu"] < 1.5
        assert row["macs"] == row["neuron_macs"] + row["router_macs"]
        assert row["split"] in ("4 + 4", "0 + 8", "4", "16")
        assert row["parameters"] > 0
        assert ("equal_macs" in row) == bool(row["spec"]["experts"])
    found = swept.results["baselines"]["real"]
    assert found["affine"]["fvu"] < 1
    assert found["pca_floor"]["4"] > found["pca_floor"]["16"]
    assert [row["fvu"] < 1 for row in swept.results["probe"]] == [True] * 4


def test_files_are_complete_and_the_page_needs_nothing_else(swept: Distilled) -> None:
    names = sorted(path.name for path in swept.output.iterdir())
    assert names == [*(f"figure-{n}.svg" for n in (1, 2, 3, 4)), "report.html", "results.json"]
    assert json.loads((swept.output / "results.json").read_text()) == json.loads(json.dumps(swept.results))
    html = (swept.output / "report.html").read_text()
    assert html.count("<svg") == 4
    assert "FVU / dense at equal MACs" in html
    assert "<script" not in html
    assert "src=" not in html


def without_times(results: dict[str, object]) -> str:
    text = json.loads(json.dumps({key: value for key, value in results.items() if key != "model"}))
    for trial in text["trials"]:
        del trial["seconds"]
    return json.dumps(text)


def test_a_stopped_sweep_goes_on_where_it_was(
    swept: Distilled, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Silent):
        left = 5

        def advance(self, detail: str = "") -> None:
            if "FVU" in detail:
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(tiny("llama"), 1, tmp_path / "out", config=config(), progress=Stopped())
    assert not (tmp_path / "out").exists()
    kept = sorted((tmp_path / "out.partial" / "trials").iterdir())
    assert len(kept) == 5
    with pytest.raises(InputError, match="holds another sweep"):
        distill(tiny("llama"), 1, tmp_path / "out", config=config(epochs=3))
    seen = []

    def counted(trial: Trial, **given: Any) -> Any:
        seen.append(trial)
        return run_trial(trial, **given)

    monkeypatch.setattr("moesaic.distill.sweep.run_trial", counted)
    done = distill(tiny("llama"), 1, tmp_path / "out", config=config())
    assert len(seen) == len(trials(config(), 32)) - 5
    assert without_times(done.results) == without_times(swept.results)


def test_a_sweep_killed_while_it_cleans_up_needs_no_training_again(
    swept: Distilled, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_given: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "_appear", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(tiny("llama"), 1, tmp_path / "out", config=config())
    (tmp_path / "out.partial" / "data" / "about.json").unlink(missing_ok=True)
    monkeypatch.setattr("moesaic.distill.sweep.run_trial", killed)
    done = distill(tiny("llama"), 1, tmp_path / "out", config=config())
    assert without_times(done.results) == without_times(swept.results)
    names = {path.name for path in done.output.iterdir()}
    assert {"results.json", "report.html"} <= names
    assert not names & {"data", "trials", "key.json"}


@pytest.mark.real
def test_the_shipped_text_is_enough_for_the_defaults(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    asked = DistillConfig().data
    assert build_windows(asked, tokenizer, None).ids_NW.numel() == asked.tokens


def test_two_processes_find_what_one_does(swept: Distilled, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    few = config(pairs=[[4, 4]], routers=["low_rank"], rates=[1e-2], probe=None)
    done = distill(tiny("llama"), -1, tmp_path / "out", config=few, processes=2)
    mine = {json.dumps(t["spec"]) + t["law"]: t["fvu"] for t in swept.results["trials"] if t["rate"] == 1e-2}
    for trial in done.results["trials"]:
        assert trial["fvu"] == pytest.approx(mine[json.dumps(trial["spec"]) + trial["law"]], rel=1e-3)


def test_without_matplotlib_there_is_a_page_and_a_note(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_results: object) -> dict[str, str]:
        raise InputError("drawing needs matplotlib", "pip install it")

    monkeypatch.setattr(job, "figures", missing)
    few = config(pairs=[[4, 4]], routers=["low_rank"], rates=[1e-2], probe=None, laws=["real"], epochs=1)
    done = distill(tiny("llama"), 0, tmp_path / "out", config=few)
    assert sorted(path.name for path in done.output.iterdir()) == ["report.html", "results.json"]


@pytest.mark.parametrize(
    ("layer", "changes", "output", "message"),
    [
        (2, {}, "out", "layer 2 of a model with 2 layers"),
        (0, {"batch": 4096}, "out", "a batch of 4096 with about 1024 training tokens"),
        (0, {"data": {"sources": "tiny", "tokens": 1280, "window": 256}}, "out", "fewer than ten windows of 256"),
        (0, {"data": {"sources": "nowhere.txt"}}, "out", "'nowhere.txt' does not exist"),
        (0, {}, "no/out", "no does not exist"),
    ],
)
def test_bad_requests_are_refused_and_nothing_written(
    tiny: Callable[[str], Path], tmp_path: Path, layer: int, changes: dict[str, object], output: str, message: str
) -> None:
    with pytest.raises(MoesaicError, match=message):
        distill(tiny("llama"), layer, tmp_path / output, config=config(**changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_that_no_sweep_left_is_neither_used_nor_removed(
    tiny: Callable[[str], Path], tmp_path: Path, restart: bool
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    with pytest.raises(InputError, match="in the way"):
        distill(tiny("llama"), 0, tmp_path / "out", config=config(), restart=restart)
    assert [path.name for path in tmp_path.rglob("*")] == ["out.partial", "mine"]


def test_what_is_not_said_about_the_text_is_as_in_the_sweeps_own_defaults() -> None:
    assert DistillConfig.model_validate({"data": {"tokens": 5000}}).data == DistillConfig().data.model_copy(
        update={"tokens": 5000}
    )


def test_more_processes_than_make_sense_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 processes"):
        check_distill(tiny("llama"), 0, config(), tmp_path / "out", 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": [[4, 40]]}, "more active experts than experts"),
        ({"rates": [0.0]}, "not all positive"),
        ({"experts": [23], "routers": ["product"]}, "no grid of pairs"),
    ],
)
def test_sweeps_without_a_student_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**changes)
