"""Sources as the command line writes them, and what ``mix`` stands for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from moesaic.calibration.config import CalibrationConfig, Source
from moesaic.errors import InputError


@pytest.mark.parametrize(
    ("text", "name", "field", "weight", "kind"),
    [
        ("wikitext", "wikitext", None, 1.0, "builtin"),
        (" c4=0.5 ", "c4", None, 0.5, "builtin"),
        ("docs/", "docs/", None, 1.0, "text"),
        ("./code", "./code", None, 1.0, "text"),
        ("data.jsonl", "data.jsonl", None, 1.0, "jsonl"),
        ("data.jsonl:body", "data.jsonl", "body", 1.0, "jsonl"),
        ("corpus.parquet:content=2.0", "corpus.parquet", "content", 2.0, "parquet"),
        (r"C:\texts\a.ndjson:t=1e-1", r"C:\texts\a.ndjson", "t", 0.1, "jsonl"),
        ("day=2020-01/notes.md", "day=2020-01/notes.md", None, 1.0, "text"),
    ],
)
def test_parse_reads_what_the_command_line_says(
    text: str, name: str, field: str | None, weight: float, kind: str
) -> None:
    source = Source.parse(text)
    assert (source.name, source.field, source.weight, source.kind) == (name, field, weight, kind)


@pytest.mark.parametrize("text", ["wikitext=-1", "wikitext=0", "", "  "])
def test_useless_sources_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        Source.parse(text)


def test_config_takes_strings_and_refuses_an_empty_list() -> None:
    assert CalibrationConfig(sources="c4").sources == (Source(name="c4"),)  # type: ignore[arg-type]
    config = CalibrationConfig(sources=["c4=2", {"name": "x.txt"}])  # type: ignore[arg-type]
    assert [source.weight for source in config.sources] == [2.0, 1.0]
    assert CalibrationConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(InputError, match="no calibration source"):
        CalibrationConfig(sources=())


@pytest.mark.parametrize("values", [{"tokens": 0}, {"window": 1}, {"nope": 1}, {"compute_dtype": "int8"}])
def test_bad_values_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CalibrationConfig.model_validate(values)


def test_every_field_is_described() -> None:
    for model in (Source, CalibrationConfig):
        assert all(field.description for field in model.model_fields.values())


def test_mix_has_the_weight_it_was_given_and_adds_to_sources_named_apart() -> None:
    weights = {s.name: s.weight for s in CalibrationConfig(sources=["mix=2", "c4=1", "x.txt"]).expanded()}  # type: ignore[arg-type]
    assert weights == pytest.approx({"wikitext": 1.0, "c4": 1.5, "code": 0.5, "x.txt": 1.0})


def test_dtype_is_resolved() -> None:
    assert CalibrationConfig(compute_dtype="bfloat16").resolved_dtype() == torch.bfloat16
    assert CalibrationConfig().resolved_dtype() in (torch.float32, torch.bfloat16)


def test_importing_the_config_does_not_import_torch() -> None:
    code = "import moesaic.calibration.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
