"""The model card's metadata, read back with the hub's own library; and that an evaluation renews it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

import moesaic
from moesaic.jobs.card import model_card, write_pages

MADE: dict[str, Any] = {
    "version": "1",
    "base_model": "acme/small-1b",
    "license": {"id": "apache-2.0"},
    "language": ["en", "de"],
    "method": "cmoe",
    "config": {"layout": "S3A3E8"},
    "calibration": {"sources": ["mix", "/home/me/notes.txt"], "tokens": 256},
    "source": "a" * 64,
    "blueprint": "b" * 64,
    "target": "glm4_moe",
}
PROTOCOL = "ppl[wikitext2-raw/test w1024 n=16]"
OWN_TEXT = "ppl[notes.txt w64 n=all]"


def evaluated(protocol: str, value: float) -> dict[str, Any]:
    ratio = {"ratio": 1.25, "low": 1.2, "high": 1.3}
    model = {"value": value, "ratio_to_dense": ratio}
    return {protocol: {"protocol": protocol, "perplexity": {"dense": {"value": value / 1.25}, "model": model}}}


def card_of(made: dict[str, Any], results: dict[str, Any] | None = None) -> tuple[ModelCardData, str]:
    made = made | {"calibration": made["calibration"] and full(made["calibration"])}
    card = ModelCard(model_card({"model_type": "glm4_moe", "moesaic": made}, results or {}))
    assert isinstance(card.data, ModelCardData)
    return card.data, card.text


def full(calibration: dict[str, Any]) -> dict[str, Any]:
    return moesaic.CalibrationConfig.model_validate(calibration).model_dump(mode="json")


def test_metadata_of_a_model_with_known_origin() -> None:
    data, text = card_of(MADE)
    assert data.to_dict() == {
        "base_model": "acme/small-1b",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "moesaic", "cmoe", "glm4_moe"],
        "datasets": ["Salesforce/wikitext", "allenai/c4"],
    }
    assert "its licence holds for them: apache-2.0." in text
    assert "/home" not in text
    assert "notes.txt" in text


def test_training_after_the_conversion_is_told() -> None:
    tuned = {"preset": "p", "steps": 30, "tokens": 4096, "trained": ["experts", "routers"], "losses": {"kl": 1.0}}
    _, text = card_of(MADE | {"tuned": tuned | {"held_out": {}}})
    assert "trained for 30 steps on 4096 tokens (experts, routers)" in text
    assert '"losses": {' in text
    assert "held_out" not in text


def test_what_is_unknown_is_left_out_and_said() -> None:
    data, text = card_of(MADE | {"base_model": "my-folder", "license": None, "language": [], "calibration": None})
    assert data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert "did not say under which licence" in text


def test_other_licences_carry_name_and_link() -> None:
    data, text = card_of(MADE | {"license": {"id": "other", "name": "acme-terms", "link": "LICENSE"}})
    assert (data.license, data.license_name, data.license_link) == ("other", "acme-terms", "LICENSE")
    assert "[acme-terms](LICENSE)" in text


def test_metrics_become_a_model_index_with_the_protocol_in_their_names() -> None:
    results = {"evaluation": evaluated(PROTOCOL, 28.5) | evaluated(OWN_TEXT, 12.0)}
    data, text = card_of(MADE, results)
    assert data.metrics == ["perplexity"]
    index = data.to_dict()["model-index"]
    name, found = model_index_to_eval_results(index)
    assert name == "acme/small-1b as a MoE, cmoe S3A3E8"
    assert [(entry.metric_type, entry.metric_name, entry.metric_value) for entry in found] == [
        ("perplexity", PROTOCOL, 28.5),
        ("perplexity-ratio", f"{PROTOCOL}, ratio to the dense model", 1.25),
        ("perplexity", OWN_TEXT, 12.0),
        ("perplexity-ratio", f"{OWN_TEXT}, ratio to the dense model", 1.25),
    ]
    assert {entry.task_type for entry in found} == {"text-generation"}
    first = found[0]
    assert (first.dataset_type, first.dataset_config, first.dataset_split) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
    )
    assert found[2].dataset_type == found[2].dataset_name == "notes.txt"
    assert f"| {PROTOCOL} | model | 28.500 | 1.250 [1.200, 1.300] |" in text


def test_a_written_folder_has_a_card_and_its_renewal_adds_the_metrics(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    done = moesaic.convert(tiny("llama"), tmp_path / "out", method="random", options={"layout": "S2A1E4"})
    before = ModelCard.load(done.output / "README.md").data.to_dict()
    assert before["tags"] == ["moe", "moesaic", "random", done.target]
    assert "model-index" not in before
    assert "base_model" not in before, "a folder's name is no model of the hub"
    stored = json.loads((done.output / "results.json").read_text())
    (done.output / "results.json").write_text(json.dumps(stored | {"evaluation": evaluated(PROTOCOL, 9.0)}))
    write_pages(done.output)
    after = ModelCard.load(done.output / "README.md").data.to_dict()
    assert after["model-index"][0]["results"][0]["metrics"][0]["value"] == 9.0
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("key", ["license", "language"])
def test_cards_of_outputs_of_older_versions_can_be_renewed(key: str) -> None:
    made = {name: value for name, value in MADE.items() if name not in (key, "target")}
    data, _ = card_of(made)
    assert getattr(data, key) is None
