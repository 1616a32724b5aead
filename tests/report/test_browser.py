"""The pages in Chromium: no error on the console, no request, and what is pointed at is explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.report.compare import comparison
from moesaic.report.page import page
from tests.report.browser import CHROMIUM, MISSING, open_page
from tests.report.examples import facts

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

_POINTS = """
const spans = [...document.querySelectorAll(".token")];
spans[1].dispatchEvent(new MouseEvent("mouseenter"));
const panel = document.querySelector(".panel").innerText;
const colours = new Set(spans.map((span) => span.style.backgroundColor));
const mode = document.querySelector("select");
mode.value = "loss"; mode.dispatchEvent(new Event("change"));
const wide = document.documentElement.scrollWidth - window.innerWidth;
return {panel, colours: colours.size, after: spans[3].style.backgroundColor, wide,
        ground: getComputedStyle(document.body).backgroundColor};
"""


def test_a_token_that_is_pointed_at_shows_its_experts(tmp_path: Path) -> None:
    opened = open_page(page(facts()), tmp_path, _POINTS)
    assert opened.console == []
    assert opened.requests == []
    assert 'data-ready="yes"' in opened.dom
    assert "loss 2.00, dense 1.50" in opened.found["panel"]
    assert "␣har" in opened.found["panel"]
    assert opened.found["colours"] == 4, "four experts were chosen first"
    assert opened.found["after"].startswith("rgba("), "coloured by loss"


def test_a_phone_shows_it_without_sideways_scrolling_and_dark_is_dark(tmp_path: Path) -> None:
    opened = open_page(page(facts()), tmp_path, _POINTS, width=500, dark=True)
    assert opened.found["wide"] <= 0
    assert opened.found["ground"] == "rgb(22, 21, 20)"


def test_a_comparison_renders(tmp_path: Path) -> None:
    opened = open_page(
        comparison([facts("a"), facts("b", 1.4)]), tmp_path, "return document.querySelectorAll('svg').length"
    )
    assert opened.console == []
    assert opened.requests == []
    assert opened.found == 4  # the map, and three charts over the layers


def test_a_page_that_asked_for_something_would_be_caught(tmp_path: Path) -> None:
    picture = '<img src="http://127.0.0.1:9/picture.png">'
    forbidden = open_page(page(facts()).replace("<footer>", f"{picture}<footer>"), tmp_path)
    assert any("Content Security Policy" in line for line in forbidden.console)
    open_to_all = open_page(f"<html><body>{picture}<script>undefinedName()</script></body></html>", tmp_path)
    assert open_to_all.requests == ["http://127.0.0.1:9/picture.png"]
    assert any("undefinedName" in line for line in open_to_all.console)
