"""Result files: one row per line, the content unchanged, and the pages that say what the files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.compare.table import markdown
from benchmarks.rows import rows_text, write_rows

from benchmarks import parity_table, real_parity, serving_speed, stability_page

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAGES = {
    "compare_smollm2-135m": lambda found: markdown(found["about"], found["rows"], found["inexpressible"]),
    "compare_qwen2.5-coder-0.5b": lambda found: markdown(found["about"], found["rows"], found["inexpressible"]),
    "parity": lambda found: parity_table.page(found["results"], found["versions"]),
    "parity_real": real_parity.table,
    "serving_speed": serving_speed.markdown,
    "stability": lambda found: stability_page.markdown(
        found["about"], found["rows"], found["left_out"], "stability.png"
    ),
}


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ([{"a": [1, {"b": 2}]}, {"a": None}], 4),
        ({"about": {"seed": 0, "texts": ["x"]}, "rows": [{"a": 1}, {"a": 2}], "named": {"x": {"y": 1}}}, 10),
        ([], 1),
        ({"rows": [], "about": {}}, 4),
        ({"figures": [1.5, 2]}, 3),
    ],
)
def test_a_row_is_a_line_and_the_content_is_kept(data: Any, lines: int, tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.json"
    write_rows(file, data)
    assert json.loads(file.read_text()) == data
    assert file.read_text().count("\n") == lines
    assert list(file.parent.iterdir()) == [file]


def test_tuples_and_numbers_as_keys_are_written_as_a_reader_finds_them() -> None:
    assert json.loads(rows_text({1: (2, 3)})) == {"1": [2, 3]}


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_published_results_have_one_row_per_line(file: Path) -> None:
    assert file.read_text() == rows_text(json.loads(file.read_text()))


@pytest.mark.parametrize("name", PAGES)
def test_published_pages_say_what_the_results_hold(name: str) -> None:
    found = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text() == PAGES[name](found)
