"""The page of a real output, of every kind of experts: it appears with the folder and what it shows is what happens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic
from moesaic.anatomy import read_anatomy
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.errors import InputError
from moesaic.jobs.compare import compare_outputs
from moesaic.jobs.report import PAGE_NAME, gather, report
from moesaic.staging.manifest import load_manifest

CALIBRATION = {"tokens": 256, "window": 64}
Tiny = Callable[[str], Path]


def converted(model: Path, out: Path, method: str, **values: Any) -> Path:
    return moesaic.convert(model, out, method=method, calibration=CALIBRATION, **values).output


@pytest.fixture(scope="module")
def output(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "out"
    return converted(tiny("llama"), folder, "cmoe", options={"layout": "S3A3E8"}, target="moesaic")


def sample_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["sample"]


def test_a_conversion_has_a_page_that_the_manifest_does_not_guard(output: Path) -> None:
    assert "Nothing has been measured yet" in (output / PAGE_NAME).read_text()
    assert PAGE_NAME not in load_manifest(output)["files"]
    (output / PAGE_NAME).write_text("changed")
    moesaic.verify(output)
    report(output)
    moesaic.verify(output)


def test_equal_conversions_have_equal_pages(tiny: Tiny, tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pages.append((converted(tiny("llama"), tmp_path / name / "out", "cmoe") / PAGE_NAME).read_bytes())
    assert pages[0] == pages[1]


def test_the_sample_is_what_the_model_does(tiny: Tiny, output: Path) -> None:
    assert report(output, baseline=tiny("llama"), again=True) == output / PAGE_NAME
    sample = sample_of(output)
    text = files("moesaic").joinpath("data", "sample.txt").read_text(encoding="utf-8")
    assert text.startswith("".join(sample["tokens"]))
    ids_T = load_tokenizer(output)(text, return_tensors="pt")["input_ids"][0][:192]
    assert len(sample["tokens"]) == 192
    model = load_model(output, "auto")
    with torch.inference_mode():
        logits_TV = model(input_ids=ids_T[None]).logits[0].float()
    expected = -logits_TV[:-1].log_softmax(-1).gather(1, ids_T[1:, None])[:, 0]
    assert sample["nll"][0] is None
    assert torch.tensor(sample["nll"][1:]) == pytest.approx(expected, abs=1e-3)
    for site in sample["sites"].values():
        assert len(site["choices"]) == 192
        assert all(len(set(chosen)) == 3 and max(chosen) < 5 for chosen in site["choices"])
        assert site["share"] == pytest.approx(0.75, abs=0.04)
        assert 0 < site["error"] < 1
    assert 'class="token"' in (output / PAGE_NAME).read_text()


def test_with_all_experts_only_rounding_is_lost(tiny: Tiny, tmp_path: Path) -> None:
    out = converted(tiny("llama"), tmp_path / "out", "random", options={"layout": "S2A3E5"}, target="moesaic")
    report(out, baseline=tiny("llama"))
    sample = sample_of(out)
    assert all(site["error"] < 1e-4 for site in sample["sites"].values())
    assert sample["nll"][1:] == pytest.approx(sample["nll_dense"][1:], abs=0.05)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("token_clusters", {"active": 0.5, "split": "union", "experts": 4}),
        ("neuron_experts", {"active": 0.5}),
        ("neuron_experts", {"active": 0.5, "weights": "int8"}),
    ],
)
def test_experts_of_other_kinds(method: str, options: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    out = converted(tiny("qwen2"), tmp_path / "out", method, options=options, target="moesaic")
    report(out, baseline=tiny("qwen2"))
    sites = sample_of(out)["sites"]
    assert len(sites) == 2
    for site in sites.values():
        assert len(site["shares"]) == 192
        assert site["share"] == pytest.approx(0.5, abs=0.2)
        assert (site["choices"] is None) == (method == "neuron_experts")
    facts = gather(out)
    assert facts.relative_bytes is not None
    # A union leaves out neurons that no expert has, and has routers. Copies of the weights as routers add nothing.
    counted = load_model(out if method == "token_clusters" else tiny("qwen2"), "auto").num_parameters()
    assert facts.parameters == counted
    assert 0.3 < facts.relative_bytes < 1.6


def test_a_stock_folder_is_read_through_the_dense_model(tiny: Tiny, tmp_path: Path) -> None:
    options = {"layout": "S3A3E8"}
    stock = converted(tiny("llama"), tmp_path / "stock", "random", options=options, target="glm4_moe", dense_layers=[0])
    report(stock)
    assert "sample" not in json.loads((stock / "results.json").read_text())
    report(stock, baseline=tiny("llama"))
    facts = gather(stock)
    assert list(facts.sample["sites"]) == ["model.layers.1.mlp"]
    assert [layer.converted for layer in facts.layers] == [False, True]
    own = converted(tiny("llama"), tmp_path / "own", "random", options=options, target="moesaic", dense_layers=[0])
    assert gather(own).ffn_bytes() == facts.ffn_bytes()


def test_experts_of_an_existing_moe(tiny: Tiny, tmp_path: Path) -> None:
    out = converted(tiny("mixtral"), tmp_path / "out", "random", options={"layout": "S2A1E4"}, hierarchical=True)
    report(out, baseline=tiny("mixtral"))
    facts = gather(out)
    assert all(site["shares"] == [] or len(site["shares"]) == 192 for site in facts.sample["sites"].values())
    assert "experts.1" in (out / PAGE_NAME).read_text()


def test_an_evaluation_renews_the_page(tiny: Tiny, output: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Ships sail at dawn, and the harbour wakes. " * 40, encoding="utf-8")
    results = moesaic.evaluate_model(output, baseline=tiny("llama"), text=text, window=64, limit=3)
    ratio = results["perplexity"]["model"]["ratio_to_dense"]["ratio"]
    assert f"{ratio:.3f} [" in (output / PAGE_NAME).read_text()


def test_an_evaluation_reads_the_sample_where_there_is_none(tiny: Tiny, tmp_path: Path) -> None:
    out = converted(tiny("llama"), tmp_path / "out", "random", options={"layout": "S3A3E8"}, target="moesaic")
    assert 'class="token"' not in (out / PAGE_NAME).read_text()
    moesaic.evaluate_model(out, window=64, limit=2)
    assert 'class="token"' in (out / PAGE_NAME).read_text()
    read = sample_of(out)
    assert "nll_dense" not in read
    report(out, baseline=tiny("llama"))
    assert sample_of(out)["nll"] == pytest.approx(read["nll"], abs=1e-3)
    assert len(sample_of(out)["nll_dense"]) == len(read["nll"])


def test_compared_outputs_are_paired_over_windows(tiny: Tiny, output: Path, tmp_path: Path) -> None:
    other = converted(tiny("llama"), tmp_path / "other", "random", options={"layout": "S3A3E8"}, target="moesaic")
    text = tmp_path / "text.txt"
    text.write_text("Ships sail at dawn, and the harbour wakes. " * 40, encoding="utf-8")
    values = []
    for folder in (output, other):
        measured = moesaic.evaluate_model(folder, baseline=tiny("llama"), text=text, window=32, limit=4)
        values.append(measured["perplexity"]["model"]["value"])
    compared = compare_outputs([output, other], tmp_path / "page.html")
    (found,) = (each for name, each in compared.paired.items() if "w32 n=4" in name)
    assert found["other"]["ratio"] == pytest.approx(values[1] / values[0])
    assert "out against other" in (tmp_path / "page.html").read_text()


def test_models_that_read_other_tokens_are_not_paired(tiny: Tiny, output: Path, tmp_path: Path) -> None:
    other = shutil.copytree(output, tmp_path / "other")
    text = tmp_path / "text.txt"
    text.write_text("Ships sail at dawn, and the harbour wakes. " * 40, encoding="utf-8")
    for folder in (output, other):
        moesaic.evaluate_model(folder, text=text, window=32, limit=2)
    assert compare_outputs([output, other]).paired
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert not compare_outputs([output, other]).paired


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_pruned_model_is_reported_as_one(family: str, tiny: Tiny, tmp_path: Path) -> None:
    out = converted(tiny(family), tmp_path / "out", "static", options={"active": 0.5}, target="dense")
    facts = gather(out)
    dense = read_anatomy(Checkpoint(tiny(family)).config)
    assert [layer.d_ff for layer in facts.layers] == [site.d_ff for site in dense.sites]
    element = getattr(torch, Checkpoint(out).dtype).itemsize
    assert facts.row_bytes == (3 if dense.gated else 2) * dense.d_model * element
    page, card = (out / PAGE_NAME).read_text(), (out / "README.md").read_text()
    assert "became narrower" in page
    assert "- moe\n" not in card
    assert "A narrower dense checkpoint" in card


def test_the_evaluation_with_most_windows_comes_last(output: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(output, tmp_path / "out")
    for limit in (4, 2):
        moesaic.evaluate_model(folder, window=32, limit=limit)
    assert [("n=2" in name, "n=4" in name) for name in gather(folder).evaluations][-1] == (False, True)


def test_what_is_no_output_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no block 'moesaic'"):
        report(tiny("llama"))
    assert not (tiny("llama") / PAGE_NAME).exists()
