"""The documentation: links lead somewhere, every page has its place in the site, the reference is complete."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import reference_pages  # noqa: E402
import site_sources  # noqa: E402
from moesaic.methods import METHODS, get_config  # noqa: E402

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md", ROOT / "examples/README.md"]
)
GENERATED = {"reference/cli.md", "reference/methods.md"}


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as forges and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    heads = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", head) for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = "".join(site_sources.CODE.split(page.read_text(encoding="utf-8"))[::2])
    broken = []
    for _, link, anchor in site_sources.LINK.findall(text):
        target = (page.parent / link).resolve() if link else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor[1:] not in anchors(target)):
            broken.append(f"{link}{anchor}")
    assert broken == []


def nav_of(entry: object) -> list[str]:
    """The pages of a part of mkdocs.yml's nav."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in nav_of(part)]  # type: ignore[union-attr]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = nav_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    places = [site_sources.place_of(str(page.relative_to(ROOT))) for page in PAGES]
    pages = {place for place in places if place is not None} | GENERATED
    assert sorted(pages - set(listed)) == [], "give these a place in the nav of mkdocs.yml"
    assert sorted(set(listed) - pages) == [], "the nav of mkdocs.yml names pages that are not there"
    assert len(listed) == len(set(listed))


def test_links_are_those_of_the_site() -> None:
    text = "see [a](docs/design.md#x), [b](benchmarks/README.md), `[c](docs/design.md)`, [d](pyproject.toml), [e](https://x.org)"
    assert site_sources.linked(text, "README.md") == (
        "see [a](design.md#x), [b](benchmarks.md), `[c](docs/design.md)`, d, [e](https://x.org)"
    )
    assert site_sources.linked("[a](../../README.md)", "docs/methods/cmoe.md") == "[a](../index.md)"


def test_the_reference_names_every_verb_and_option() -> None:
    page = reference_pages.cli_page()
    commands = reference_pages.commands()
    assert {"convert", "eval", "report", "compare"} <= commands.keys()
    for name, command in commands.items():
        section = page.partition(f"## moesaic {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            assert all(option in section for option in parameter.opts if option.startswith("-")), (name, parameter.opts)


def test_the_reference_names_every_option_of_every_method() -> None:
    page = reference_pages.methods_page()
    for method in METHODS:
        section = page.partition(f"## {method}\n")[2].partition("\n## ")[0]
        assert all(f"| `{option}` |" in section for option in get_config(method).model_fields), method
