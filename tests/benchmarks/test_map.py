"""The map: rows are measured once and go on, points are paired, and the page says what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.map import __main__ as module
from benchmarks.map import tasks
from benchmarks.map.__main__ import main
from benchmarks.map.cost import Shape
from benchmarks.map.measure import Bench
from benchmarks.map.page import markdown, own_grid
from benchmarks.map.points import Point, Setting, beaten, best_within, measured, published
from benchmarks.map.references import (
    LowBit,
    Reference,
    Scored,
    Teal,
    WeightOnly,
)
from benchmarks.map.rows import BY_KEY, ROWS
from benchmarks.rows import read_lines

from moesaic.anatomy import read_anatomy
from moesaic.calibration.config import CalibrationConfig
from moesaic.calibration.samples import sample_text
from moesaic.checkpoint.reader import Checkpoint
from tests.tiny_models import build_tiny

GATED = Shape(64, 96)


# a model


@pytest.fixture(scope="module", name="dense")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("map") / "tiny")


def bench(folder: Path, **options: Any) -> Bench:
    calibration = {"sources": ["wiki"], "tokens": 512, "window": 128, "compute_dtype": "float32"}
    return Bench(folder, CalibrationConfig.model_validate(calibration), **options)


def test_the_dense_row_is_the_model(dense: Path) -> None:
    from moesaic.checkpoint.loading import load_model

    taken_apart = bench(dense)
    taken_apart.table.update(taken_apart.fitted(Reference()))
    ids_1W = torch.arange(40)[None]
    with torch.inference_mode():
        expected = load_model(dense, torch.float32)(input_ids=ids_1W).logits
        assert torch.equal(taken_apart.model(input_ids=ids_1W).logits, expected)


@pytest.mark.parametrize("family", ["gpt2", "opt"])  # transposed weights; an FFN spread over its layer
def test_families_without_a_gate(family: str, tmp_path: Path) -> None:
    from moesaic.checkpoint.loading import load_model

    folder = build_tiny(family, tmp_path / family)
    taken_apart = bench(folder)
    ids_1W = torch.arange(2, 40)[None]
    taken_apart.table.update(taken_apart.fitted(LowBit(active=1.0)))
    with torch.inference_mode():
        expected = load_model(folder, torch.float32)(input_ids=ids_1W).logits
        torch.testing.assert_close(taken_apart.model(input_ids=ids_1W).logits, expected)


def test_one_threshold_for_all_layers(dense: Path) -> None:
    ffns = bench(dense).fitted(LowBit(active=0.5, choice="shared"))
    assert len({ffn.threshold for ffn in ffns.values()}) == 1
    assert len({ffn.threshold for ffn in bench(dense).fitted(LowBit(choice="threshold")).values()}) == len(ffns)


def test_a_refit_makes_up_for_neurons(dense: Path) -> None:
    """On the text that it was made on, in the first layer, whose input no other layer changes."""
    taken_apart = bench(dense)
    path = next(iter(taken_apart.weights))
    plain, refitted = (taken_apart.fitted(LowBit(active=0.25, refit=on))[path] for on in (False, True))
    with torch.no_grad():
        x_TD = taken_apart._dense_inputs()[path]
        want = taken_apart.weights[path](x_TD)
        relative = [float(((ffn(x_TD) - want).norm(dim=1) / want.norm(dim=1)).mean()) for ffn in (plain, refitted)]
    assert relative[1] < 0.95 * relative[0]


def test_noise_is_the_same_for_every_row(dense: Path) -> None:
    one, two = (bench(dense, noise=True).weights for _ in range(2))
    clean = bench(dense).weights
    for path, noised in one.items():
        assert torch.equal(noised.up_FD, two[path].up_FD)
        assert not torch.equal(noised.up_FD, clean[path].up_FD)


def arguments(dense: Path, tmp_path: Path, *more: str) -> list[str]:
    shared = ["--windows", "2", "--window", "64", "--calib", "wiki", "--tokens", "512"]
    return [str(dense), str(tmp_path / "work"), *shared, "--results", str(tmp_path / "results"), *more]


def test_a_run_goes_on_where_it_stopped(dense: Path, tmp_path: Path) -> None:
    asked = arguments(dense, tmp_path, "--texts", "WikiText-2", "--rows", "dense")
    main(asked)
    file = tmp_path / "work" / "rows.jsonl"
    before = file.read_text()
    assert read_lines(file)
    file.write_text(before + before[:50])  # as a crash leaves it
    main([*asked, "low4@50"])
    found = read_lines(file)
    assert [record["row"] for record in found] == ["dense", "low4@50"]
    assert file.read_text().startswith(before)
    main([*asked, "low4@50"])
    assert read_lines(file) == found
    main([*asked, "--noise"])
    assert [record["noise"] for record in read_lines(file)] == [False, False, True]
    with pytest.raises(SystemExit):
        main([*asked, "--tokens", "1024"])  # other thresholds


def test_calibration_on_an_evaluated_text_is_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "mine.txt"
    copy.write_text(sample_text("tiny")[:900])
    with pytest.raises(SystemExit):
        main(arguments(dense, tmp_path, "--rows", "dense", "--texts", "stories", "--calib", str(copy)))
    assert "evaluated and calibrated on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(arguments(dense, tmp_path, "--page"))


# the page


def test_questions_are_answered_once_with_each_rows_ffns(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def answers(model: Any, _tokenizer: Any, _names: list[str], limit: int, _work: Path) -> dict[str, list[int]]:
        with torch.inference_mode():
            seen.append(model(input_ids=torch.arange(2, 12)[None]).logits)
        return {"arc_easy": [1] * limit}

    monkeypatch.setattr(tasks, "task_accuracy", answers)  # lm-eval's part
    monkeypatch.setattr(module, "data_folder", lambda: None)
    for _ in range(2):
        main(arguments(dense, tmp_path, "--rows", "dense", "low4@50", "--questions", "2"))
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])
    assert [found["row"] for found in read_lines(tmp_path / "work" / tasks.FILE)] == ["dense", "low4@50"]


def line(row: str, nll: tuple[float, ...], text: str = "WikiText-2", **changes: Any) -> dict[str, Any]:
    perplexity = {"name": "p", "value": 1.0, "predicted": 10 * len(nll), "window_nll": list(nll)}
    used = {"inputs": 1.0, "neurons": 0.5 if "@" in row else 1.0}
    shared = {"window": 1024, "windows": len(nll), "noise": False}
    return {"row": row, "text": text, **shared, "perplexity": perplexity, "used": used} | changes


LINES = [
    line("dense", (20.0, 21.0)),
    line("int8", (20.1, 21.1)),
    line("low4@50", (20.4, 21.5)),
    line("nested@50", (20.4, 21.4)),
    line("oracle@50", (20.0, 21.0)),
    line("nested@50", (22.0, 23.0), noise=True),
    line("dense", (21.0, 22.0), noise=True),
    line("low2@50", (24.0, 25.0)),
    line("low2-squares@50", (23.0, 24.0)),
]


def test_a_row_is_compared_with_dense_on_its_own_windows() -> None:
    points = {(point.row, point.setting.noise): point for point in measured(LINES, GATED)}
    assert points["nested@50", False].ratio.ratio == pytest.approx(torch.tensor(0.04).exp().item())
    assert points["nested@50", True].ratio.ratio == pytest.approx(torch.tensor(0.1).exp().item())
    assert points["int8", False].cost.bytes == pytest.approx(8.25 / 16)


def test_what_reads_more_and_is_worse_is_named() -> None:
    points = [point for point in measured(LINES, GATED) if not point.setting.noise]
    lost = {mine.row: other.row for mine, other in beaten(points)}
    assert lost == {"low4@50": "int8", "low2@50": "int8"}
    best = best_within(points, 0.4, "bytes")
    assert best is not None
    assert best.row == "nested@50"
    assert best_within(points, 0.1, "bytes") is None  # the oracle cannot be built


def test_published_rows_are_cut_to_the_same_windows() -> None:
    def row(case: str, nll: list[float], **size: float) -> dict[str, Any]:
        perplexity = {"WikiText-2": {"name": "p", "value": 1.0, "predicted": 10 * len(nll), "window_nll": nll}}
        return {"case": case, "fraction": 0.5, "size": size, "perplexity": perplexity}

    rows = [
        row("dense", [20.0, 21.0, 50.0], parameters=1000, stored_ffn=1.0, active_ffn=1.0),
        row("union-lead", [21.0, 22.0, 90.0], parameters=1010, stored_ffn=1.0, active_ffn=0.5)
        | {"active_on": {"WikiText-2": 0.6}},
        row("static-lead", [22.0, 23.0, 90.0], parameters=600, stored_ffn=0.5, active_ffn=0.5),
        row("cmoe", [1.0, 1.0, 1.0], parameters=1, stored_ffn=1.0, active_ffn=0.5),
    ]
    comparison = {"about": {"window": 1024}, "rows": rows}
    found = published(comparison, {Setting("WikiText-2"): 2, Setting("WikiText-2", 128): 2}, ffn_parameters=800)
    assert [point.row for point in found] == ["union-lead@50", "static-lead@50"]
    assert found[0].ratio.ratio == pytest.approx(torch.tensor(0.1).exp().item())
    assert found[0].cost.bytes == pytest.approx(0.6 + 2 * 10 / 800)
    assert found[1].cost.bytes == pytest.approx(0.5)


def test_the_page_says_all_of_it(dense: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    about = {"model": "tiny", "calibration": {"sources": ["wiki=1"], "tokens": 512, "seed": 0}, "dtype": "float32"}
    (work / "protocol.json").write_text(json.dumps(about))
    (work / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in LINES))
    answers = {"dense": [1, 1, 0, 1], "low4@50": [1, 0, 0, 1]}
    tasks = [{"row": row, "limit": 2, "tasks": {"a": found[:2], "b": found[2:]}} for row, found in answers.items()]
    (work / "tasks.jsonl").write_text("".join(json.dumps(each) + "\n" for each in tasks))
    main(arguments(dense, tmp_path, "--page"))
    results = tmp_path / "results"
    text = (results / "map_tiny.md").read_text()
    assert "| neuron experts nested in int8, 50 % (`nested@50`) | 50.0% |" in text
    assert "| WikiText-2 | 1024 | with noise |" in text
    assert "`low2@50` | 0.905" in text  # the variant beside its base
    assert "Where ours loses (WikiText-2)" in text
    assert "| neuron experts, 4 bits, 50 % (`low4@50`) | 4 | 50.0% | -25.0 [" in text
    assert len(json.loads((results / "map_tiny.json").read_text())["lines"]) == len(LINES)
    assert (results / "map_tiny.png").stat().st_size > 1000


def test_a_model_that_lies_on_a_grid_is_no_comparison_for_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = build_tiny("llama", tmp_path / "tiny", dtype="float32")
    assert own_grid(Checkpoint(folder), read_anatomy(Checkpoint(folder).config)) == set()
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "mlp" in name:
            tensors[name] = WeightOnly(4, 32)._grid(tensors[name]).decoded().contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    own = own_grid(Checkpoint(folder), read_anatomy(Checkpoint(folder).config))
    assert "q4-g32" in own
    point = replace(measured(LINES, GATED)[0], row="q4-g32", group="grid")
    assert not point.buildable


def test_a_page_without_rows_says_so() -> None:
    about = {"model": "m", "calibration": {"sources": ["wiki"], "tokens": 1}, "dtype": "float32", "machine": "x"}
    assert "## All rows" in markdown(about, list[Point](), [], [])


def test_rows_have_one_name_each_and_their_base() -> None:
    assert len(BY_KEY) == len(ROWS)
    assert {row.base for row in ROWS if row.base} <= BY_KEY.keys()
    for row in ROWS:
        if "@" in row.key and isinstance(row.reference, Scored | Teal):
            assert row.label.endswith(f"{100 * row.reference.active:.0f} %")
        if isinstance(row.reference, WeightOnly):
            assert str(row.reference.bits) in row.label
