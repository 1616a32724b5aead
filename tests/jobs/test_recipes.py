"""Each preset gives the settings of the published cell that it names, as the results' JSON recorded them."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from moesaic.jobs.recipes import recipe, recipe_names
from moesaic.jobs.settings import ConvertSettings
from moesaic.methods import get_config
from moesaic.options import build

ROOT = Path(__file__).parents[2]
SAMPLES = {"wikitext": "wikitext2_valid.txt", "wiki": "wiki.txt", "tiny": "tiny.txt", "code": "code.txt"}
MAPS_BITS = {"low4": 4, "low3": 3}


def cell_of(name: str) -> list[str]:
    """The second line of a recipe: the JSON, the row, the share of neurons; or `none` and why."""
    line = (files("moesaic") / "recipes" / f"{name}.yaml").read_text().splitlines()[1]
    assert line.startswith("# cell: "), f"{name} does not say which published cell it gives"
    return line.removeprefix("# cell: ").split()


def in_json(kind: str) -> list[str]:
    return [name for name in recipe_names() if cell_of(name)[0].startswith(f"docs/results/{kind}")]


def options_of(settings: ConvertSettings) -> dict[str, Any]:
    config = build(get_config(settings.method), settings.options, "options")
    return json.loads(config.model_dump_json())


def test_every_recipe_names_its_cell() -> None:
    for name in recipe_names():
        place, *_ = cell_of(name)
        assert place == "none," or (ROOT / place).is_file()


@pytest.mark.parametrize("name", in_json("compare"))
def test_a_row_of_the_comparison(name: str) -> None:
    place, case, fraction = cell_of(name)
    data = json.loads((ROOT / place).read_text())
    (row,) = [row for row in data["rows"] if (row["case"], row["fraction"]) == (case, float(fraction))]
    settings = build(ConvertSettings, recipe(name), "settings")
    assert settings.method == row["settings"]["method"]
    given = options_of(settings)
    assert {key: given[key] for key in row["options"]} == row["options"]
    assert (None if settings.router is None else settings.router.mode) == row["settings"]["router"]
    assert list(settings.dense_layers) == row["settings"]["dense_layers"]
    if build(get_config(settings.method), settings.options, "options").needs_calibration():
        about = data["about"]["calibration"]
        assert settings.calibration.tokens == about["tokens"]
        texts = [f"{SAMPLES[each.label]}={each.weight:g}" for each in settings.calibration.sources]
        assert texts == about["sources"]


@pytest.mark.parametrize("name", in_json("map"))
def test_a_row_of_the_map(name: str) -> None:
    place, row = cell_of(name)
    assert row in {line["row"] for line in json.loads((ROOT / place).read_text())["lines"]}
    bits, _, percent = row.partition("@")
    given = options_of(build(ConvertSettings, recipe(name), "settings"))
    assert (given["bits"], given["active"], given["refit"]) == (MAPS_BITS[bits], int(percent) / 100, False)


@pytest.mark.parametrize("name", in_json("tomoe"))
def test_a_run_of_tomoe(name: str) -> None:
    place, run = cell_of(name)
    (row,) = [row for row in json.loads((ROOT / place).read_text()) if row["run"] == run]
    settings = recipe(name)
    assert settings["options"] == row["options"]
    built = build(ConvertSettings, settings, "settings")
    assert [f"{SAMPLES[each.label]} x {each.weight:g}" for each in built.calibration.sources] == row["text"]
