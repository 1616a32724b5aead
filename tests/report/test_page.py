"""The pages as text: figures are right, nothing is loaded from elsewhere, nothing known is needed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from moesaic.report.compare import comparison, comparison_rows
from moesaic.report.facts import protocol_words
from moesaic.report.page import page
from tests.report.examples import LAYERS, MADE, PROTOCOL, facts, ratio

_VOID = {"meta", "link", "input", "br"}


class _Balance(HTMLParser):
    """Refuses an element that is closed where another one is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("made", [page(facts()), comparison([facts("a"), facts("b", 1.4)]), page(facts(results={}))])
def test_pages_are_whole_and_load_nothing(made: str) -> None:
    parser = _Balance()
    parser.feed(made)
    assert parser.open == []
    assert all(link.startswith(("#", "data:")) for link in parser.links)
    assert not re.search(r"url\(|@import|https?://", made)


def test_the_figures_are_those_of_the_results() -> None:
    made = page(facts())
    assert "1.200 [1.180, 1.220]" in made
    assert "control: static pruning" in made
    assert "1.30" in made  # 13 tokens per second over 10
    own = facts(results={})
    bytes_planned = (100 + 40 + 50) * 60 + 2 * 160
    assert own.ffn_bytes() == bytes_planned
    assert own.relative_bytes == pytest.approx(bytes_planned / (300 * 60))
    on_sample = (100 + 40 + 40) * 60 + 2 * 160
    assert facts().relative_bytes == pytest.approx(on_sample / (300 * 60))


def test_each_layer_has_its_row_and_dense_ones_say_so() -> None:
    made = page(facts())
    rows = re.findall(r"<tr><td class=\"text\">(model\.layers\.\d\.mlp)</td>(.*?)</tr>", made)
    assert [path for path, _ in rows] == [layer.path for layer in LAYERS]
    assert "dense" in rows[0][1]
    assert ">10-30<" in rows[2][1]


def test_a_page_says_what_has_not_been_measured() -> None:
    made = page(facts(results={}, layers=()))
    assert "Nothing has been measured yet" in made
    assert "The blueprint no longer holds" in made
    assert "Not read yet" in made


def test_what_a_text_holds_cannot_end_the_script_or_become_html() -> None:
    made = page(facts())
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', made, re.DOTALL)
    assert json.loads(data)["tokens"][3] == "</script>"
    named = page(facts(config={"model_type": "moesaic", "moesaic": MADE | {"base_model": "<img src=x>"}}))
    assert "<img" not in named


def test_a_path_of_the_user_is_not_told() -> None:
    assert "/home/me" not in page(facts())
    assert "notes.txt" in page(facts())


def test_training_curves_of_what_was_logged() -> None:
    assert "Training" in page(facts())
    assert "held out" in page(facts())
    assert ">Training<" not in page(facts(training=()))


def test_compared_rows_hold_each_models_value() -> None:
    models = [facts("a"), facts("b", 1.4, config={"model_type": "moesaic", "moesaic": MADE | {"config": {}}})]
    rows = {row[0]: row[1:] for row in comparison_rows(models, {PROTOCOL: {"b": ratio(1.17)}})}
    assert rows["layout"] == ["S2A1E10", ""]
    words = protocol_words(PROTOCOL)
    assert rows[f"perplexity, {words}"] == ["24.000", "28.000"]
    assert rows[f"over dense [95 %], {words}"] == ["1.200 [1.180, 1.220]", "1.400 [1.380, 1.420]"]
    assert rows[f"over a [95 %], {words}"] == ["", "1.170 [1.150, 1.190]"]
    assert rows["generating, over dense"] == ["1.30", "1.30"]


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        (PROTOCOL, "wikitext2-raw/test, 6 windows of 512 tokens"),
        ("ppl[my text.txt@12ab w64 n=all bf16]", "my text.txt@12ab, all windows of 64 tokens, bf16"),
        ("something else", "something else"),
    ],
)
def test_protocols_in_words(protocol: str, words: str) -> None:
    assert protocol_words(protocol) == words


def test_folders_of_one_name_are_told_apart() -> None:
    assert "out (1) against out (2)" in comparison([facts(), facts()])
