"""What an evaluation keeps: it goes on where it was stopped, and measures the dense model once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moesaic
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.evaluate.perplexity import perplexity, token_windows
from moesaic.progress import Silent


class Notes(Silent):
    """Keeps what is said; ``stop_at`` interrupts at the note that begins so, or at a step of that label."""

    def __init__(self, stop_at: str = "", step: int = 0) -> None:
        self.said: list[str] = []
        self._stop_at, self._step = stop_at, step
        self._label, self._done = "", 0

    def start(self, label: str, total: int) -> None:
        self._label, self._done = label, 0

    def advance(self, detail: str = "") -> None:
        self._done += 1
        if self._step and (self._label, self._done) == (self._stop_at, self._step):
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.said.append(text)
        if self._stop_at and not self._step and text.startswith(self._stop_at):
            raise KeyboardInterrupt

    def about(self, label: str) -> list[str]:
        """The notes about one model."""
        return [note for note in self.said if note.startswith((f"{label}:", f"perplexity of {label}:"))]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.txt"
    path.write_text("Ships sail at dawn, and the harbour wakes. " * 80, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def converted(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    options = {"layout": "S3A3E8"}
    return moesaic.convert(tiny("llama"), out, method="random", options=options, target="moesaic").output


@pytest.fixture
def evaluate(
    tiny: Callable[[str], Path], converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Evaluates ``tmp_path / "out"``, with an empty cache at the start of the test."""
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    shutil.copytree(converted, tmp_path / "out")

    def run(**given: Any) -> dict[str, Any]:
        asked: dict[str, Any] = {"baseline": tiny("llama"), "text": text, "window": 64, "limit": 4, "dtype": "fp32"}
        return moesaic.evaluate_model(tmp_path / "out", **asked | given)

    return run


def test_an_interrupted_evaluation_goes_on(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(progress=Notes("model", step=3))
    notes = Notes()
    resumed = evaluate(progress=notes)
    assert notes.about("dense") == [f"dense: perplexity {resumed['perplexity']['dense']['value']:.3f}, measured before"]
    assert "3 of them measured before" in notes.about("model")[0]
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "another"))
    assert evaluate()["perplexity"] == resumed["perplexity"]


def test_a_figure_is_saved_when_it_is_known(evaluate: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(controls=True, progress=Notes("control random"))
    (stored,) = json.loads((tmp_path / "out" / "results.json").read_text())["evaluation"].values()
    assert set(stored["perplexity"]) == {"dense", "model", "static"}
    notes = Notes()
    whole = evaluate(controls=True, progress=notes)
    assert "measured before" in notes.about("static")[-1]
    assert whole["perplexity"]["static"] == stored["perplexity"]["static"]
    assert whole["perplexity"]["static"]["active_ffn_fraction"] == pytest.approx(0.75, abs=0.03)


def test_more_windows_begin_with_those_that_are_known(evaluate: Callable[..., dict[str, Any]]) -> None:
    few = evaluate(limit=2)["perplexity"]["dense"]["window_nll"]
    notes = Notes()
    many = evaluate(limit=5, progress=notes)["perplexity"]["dense"]["window_nll"]
    assert many[:2] == few
    assert "2 of them measured before" in notes.about("dense")[0]
    assert evaluate(limit=5, fresh=True, progress=(again := Notes()))["perplexity"]["dense"]["window_nll"] == many
    assert not any("measured before" in note for note in again.said)


def test_other_weights_texts_and_precisions_are_measured_anew(
    evaluate: Callable[..., dict[str, Any]], text: Path, tmp_path: Path
) -> None:
    first = evaluate()["perplexity"]
    name = "model.norm.weight"
    weights = Checkpoint(tmp_path / "out").info(name).file
    tensors = load_file(weights)
    save_file(tensors | {name: 2 * tensors[name]}, weights, metadata={"format": "pt"})
    (tmp_path / "out" / "manifest.json").unlink()
    second = evaluate(fidelity=False)["perplexity"]
    assert second["dense"] == first["dense"]
    assert second["model"]["value"] != first["model"]["value"]
    halves = evaluate(dtype="bf16")
    assert halves["protocol"].endswith(" w64 n=4 bf16]")
    assert halves["perplexity"]["dense"]["value"] != first["dense"]["value"]
    text.write_text(text.read_text().replace("dawn", "noon"), encoding="utf-8")
    assert evaluate()["perplexity"]["dense"]["value"] != first["dense"]["value"]


def test_a_damaged_cache_is_measured_anew(evaluate: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    first = evaluate()["perplexity"]
    for file in (tmp_path / "cache" / "evaluations").iterdir():
        lines = file.read_text().splitlines()
        file.write_text("\n".join([*lines[:-1], lines[-1][:20]]) + "\n")
    assert evaluate()["perplexity"] == first


def test_without_a_cache_everything_is_measured(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "file"))
    notes = Notes()
    assert evaluate(progress=notes)["perplexity"]["dense"]["value"] > 1
    assert any("not kept for a later run" in note for note in notes.said)


def test_by_default_sixteen_windows_are_read(evaluate: Callable[..., dict[str, Any]]) -> None:
    assert evaluate(limit=None, window=32)["protocol"].endswith(" w32 n=16]")
    assert evaluate(limit=None, window=32, full=True)["protocol"].endswith(" w32 n=all]")


def test_both_models_compute_in_the_asked_precision(
    tiny: Callable[[str], Path], text: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    ids_NW = token_windows(load_tokenizer(tiny("llama")), text.read_text(), 64, 4)
    for asked, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        plain = perplexity(load_model(tiny("llama"), dtype), ids_NW, "plain")
        assert evaluate(dtype=asked)["perplexity"]["dense"]["window_nll"] == list(plain.window_nll)
