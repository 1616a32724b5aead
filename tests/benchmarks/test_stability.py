"""The stability benchmark: texts that never overlap, splits found under another order, verdicts, runs that go on."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.stability import HELD_OUT, Site, main, read_texts, renumbered
from benchmarks.stability_measures import partition_agreement, used_neurons
from benchmarks.stability_page import SECOND_HALF, SEED, beyond_chance, grouped, markdown, reading, verdict

from benchmarks import stability
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.jobs.settings import ConvertSettings
from tests.ffns import random_ffn, random_inputs
from tests.tiny_models import build_tiny, tiny_tokenizer


def counted(name: str) -> str:
    """Text in which no number occurs twice."""
    start = {"wikitext": 10_000, "c4": 40_000, "code": 60_000}[name]
    return " ".join(str(number) for number in range(start, start + 900))


def test_no_text_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "sample_text", counted)
    tokenizer = tiny_tokenizer()
    texts = read_texts(["wikitext", "c4", "code"], 512, 256, 64, tokenizer)
    spans = texts.calibration | {f"{HELD_OUT} {name}": rows for name, rows in texts.heldout.items()}
    assert set(spans) == {"wikitext", SECOND_HALF, "c4", "code"} | {f"{HELD_OUT} {n}" for n in texts.heldout}
    numbers = {
        name: {int(word) for row in texts.ids_NW[rows] for word in tokenizer.decode(row).split()[1:-1]}
        for name, rows in spans.items()
    }
    assert {name: rows.stop - rows.start for name, rows in spans.items()} == {
        name: 4 if name.startswith(HELD_OUT) else 8 for name in spans
    }
    for one, other in combinations(numbers, 2):
        assert not numbers[one] & numbers[other], (one, other)
    assert max(numbers["wikitext"]) < min(numbers[SECOND_HALF]) < max(numbers[SECOND_HALF])
    assert max(numbers[SECOND_HALF]) < min(numbers[f"{HELD_OUT} wikitext"])
    read = texts.take(torch.arange(texts.ids_NW.numel())[:, None], texts.heldout["c4"])
    assert torch.equal(texts.ids_NW.flatten()[read.x_TD[:, 0]], texts.ids_NW[texts.heldout["c4"]].flatten())
    with pytest.raises(InputError, match="are needed"):
        read_texts(["c4"], 4096, 64, 64, tokenizer)
    with pytest.raises(InputError, match="no whole windows"):
        read_texts(["c4"], 100, 64, 64, tokenizer)


@pytest.mark.parametrize("name", ["clusters", "disjoint", "cmoe-oracle", "static"])
def test_the_split_of_a_reordered_ffn_is_renumbered_to_the_same_function(name: str) -> None:
    weights, x_TD = random_ffn(48, dtype=torch.float32), random_inputs(640).float()
    texts = stability.Texts(torch.zeros(10, 64), {"wikitext": slice(0, 6)}, {"wikitext": slice(6, 10)})
    options = {
        "clusters": {"method": "token_clusters", "options": {"experts": 4}},
        "disjoint": {"method": "token_clusters", "options": {"split": "disjoint", "experts": 8}},
        "cmoe-oracle": {"method": "cmoe", "router": "oracle"},
        "static": {"method": "static"},
    }
    site = Site(weights, x_TD, texts, {name: ConvertSettings(**options[name])})
    plan = site.plan(name, "wikitext", 1, reordered=True)
    same = renumbered(plan, site.order_F)
    inputs = SiteInputs(x_TD[:50])
    ours_TF = used_neurons(site.weights, same, inputs)
    assert torch.equal(ours_TF[:, site.order_F], used_neurons(site.reordered, plan, inputs))
    if name == "static":
        assert partition_agreement(site.plan(name, "wikitext", 0), same).shared == 1
    for own, other in zip((same.shared, *same.experts), (plan.shared, *plan.experts), strict=True):
        assert torch.equal(own < 0, other < 0)


def row(name: str, errors: list[float], **more: Any) -> dict[str, Any]:
    pair = {"used": 0.8, "used_random": 0.6, "shared": None, "shared_random": None, "rand": None}
    pair |= {"matched": None, "matched_random": None, "error": 0.5}
    found: dict[str, Any] = {"error": sum(errors) / len(errors), "windows": errors}
    if name not in ("static", "refit"):
        found |= {"overlap": 0.7, "chance": 0.5, "energy_router": 0.7, "energy_oracle": 0.8, "dead": 0}
    domain = found | {"own": {**found, "error": found["error"] / 2}}
    pairs = {SECOND_HALF: pair, SEED: pair, "c4": pair | {"used": 0.7}}
    about = {"row": name, "label": f"method {name}", "layer": 0, "reads": "text", "seconds": 60.0}
    return about | {"pairs": pairs, "domains": {"wikitext": domain, "c4": domain}} | more


def test_verdicts_are_paired_over_windows_and_against_the_better_control() -> None:
    control = [0.1, 0.5, 0.9, 1.3]
    rows = [
        row("clusters", [x - 0.02 for x in control]),
        row("disjoint", [0.12, 0.46, 0.93, 1.29]),
        row("cmoe", [x + 0.05 for x in control]),
        row("static", control),
        row("refit", [x + 0.2 for x in control]),
    ]
    groups = grouped(rows)
    assert [verdict(groups, name, "c4") for name in groups] == [-1, 0, 1, 0, 0]
    assert beyond_chance(groups["cmoe"], SECOND_HALF) == pytest.approx(0.5)
    said = " ".join(reading(groups, "wikitext", ["c4"]))
    assert "method clusters on WikiText, C4." in said
    assert "Above it on every text: method cmoe." in said
    assert "is 2.00 (method clusters) times" in said
    assert "their order makes" not in said
    ties = row("cmoe", control)
    ties["pairs"] = {
        pair: found | {"rand": 0.4 if pair == SECOND_HALF else 0.0} for pair, found in ties["pairs"].items()
    }
    assert "not the text: method cmoe 0.40 and 0.00." in " ".join(reading(grouped([ties]), "wikitext", ["c4"]))
    about = {"model": "m", "active": "75", "tokens": 1, "held": 1, "window": 1, "domains": ["wikitext", "c4"]}
    about |= {"stream": "float32", "seed": 0, "threads": 1, "machine": "x", "versions": {}}
    page = markdown(about, rows, {"that": "why"}, "plot.png")
    assert "**0.680** (0.340)" in page
    assert "* that: why." in page
    assert "| method static | 0.80 (0.60) | 0.80 (0.60) | 0.70 (0.60) |" in page


def test_a_run_writes_the_page_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stability, "sample_text", counted)
    dense = build_tiny("llama", tmp_path / "tiny", d_ff=64)
    report = tmp_path / "out" / "page"
    kept = ["--tokens", "256", "--held", "128", "--window", "64", "--domains", "wikitext", "c4"]
    asked = [str(dense), *kept, "--report", str(report), "--layers", "1"]
    main([*asked, "--only", "static", "random"])
    first = json.loads(report.with_suffix(".json").read_text())["rows"]
    assert "Neurons that a token uses" not in report.with_suffix(".md").read_text()
    main([*asked, "--only", "static", "cmoe-oracle", "random", "union"])
    rows = {found["row"]: found for found in json.loads(report.with_suffix(".json").read_text())["rows"]}
    assert set(rows) == {"static", "cmoe-oracle", "random", "union"}
    assert 0.5 < rows["union"]["domains"]["wikitext"]["active"] < 1
    assert "active" not in rows["cmoe-oracle"]["domains"]["wikitext"]
    assert rows["static"] == next(found for found in first if found["row"] == "static")
    assert rows["static"]["pairs"][SEED]["used"] == 1
    assert 0.4 < rows["static"]["pairs"]["c4"]["used"] <= 1
    assert (rows["random"]["reads"], rows["random"]["pairs"]["c4"]["used"]) == ("nothing", 1)
    assert rows["random"]["pairs"][SEED]["used"] < 0.8
    routed = rows["cmoe-oracle"]["domains"]["c4"]
    assert 0 < routed["overlap"] <= 1
    assert routed["energy_router"] <= routed["energy_oracle"]
    assert routed["error"] == pytest.approx(sum(routed["windows"]) / 2, abs=1e-5)
    page = report.with_suffix(".md").read_text()
    assert str(tmp_path) not in page
    assert "nan" not in page
    assert "## Neurons that a token uses" in page
    assert "* MoEfication: not measured in this run." in page
    assert report.with_suffix(".png").stat().st_size > 10_000
    for changed, message in [(["--window", "32"], "window differ"), (["--layers", "7"], "layer 7 of a model")]:
        with pytest.raises(SystemExit):
            main([*asked, *changed])
        assert message in capsys.readouterr().err
