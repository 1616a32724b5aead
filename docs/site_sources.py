"""Gathers the sources of the site below build/docs: these pages, those from beside docs/, and the generated reference.

    python docs/site_sources.py && zensical build --strict

Links of the repository become links of the site; what has no page there becomes plain words. Equations become MathML,
which browsers draw without scripts. Nothing of this is needed to read the pages as they are.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "docs"
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
}
"""Pages from outside docs/, by path in the repository, and their place on the site."""
CODE = re.compile(r"(^```.*?^```$|^ {4}[^\n]*$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)#\s]*)(#[^)\s]*)?\)")
_MATH = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\w$])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$(?![\w$])", re.DOTALL)


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """``change`` applied to what is no code."""
    pieces = CODE.split(markdown)
    return "".join(piece if place % 2 else change(piece) for place, piece in enumerate(pieces))


def place_of(path: str) -> str | None:
    """Where a file of the repository is on the site; None where it is not."""
    if path in BESIDE:
        return BESIDE[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def linked(markdown: str, path: str) -> str:
    """The text of a page of the repository with the site's links; ``path``: of the page, in the repository."""
    here = place_of(path) or ""

    def moved(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        wanted = place_of(target)
        if wanted is None or not (ROOT / target).is_file() or target.endswith((".py", ".json")):
            return text
        return f"[{text}]({posixpath.relpath(wanted, posixpath.dirname(here) or '.')}{anchor})"

    return outside_code(markdown, lambda text: LINK.sub(moved, text))


def drawn(markdown: str) -> str:
    """Equations between dollars as MathML."""
    from latex2mathml.converter import convert

    def draw(match: re.Match[str]) -> str:
        block = match["block"] is not None
        made = convert(match["block"] if block else match["inline"], display="block" if block else "inline")
        return made.replace("*", "&#42;").replace("_", "&#95;")

    return outside_code(markdown, lambda text: _MATH.sub(draw, text))


def main() -> None:
    """Write build/docs anew."""
    sys.path.insert(0, str(ROOT / "docs"))
    from reference_pages import cli_page, methods_page

    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree(ROOT / "docs", OUT, ignore=shutil.ignore_patterns("*.py", "*.json", "__pycache__"))
    pages = {path: place for path, place in BESIDE.items() if (ROOT / path).exists()}
    pages |= {f"docs/{file.relative_to(OUT).as_posix()}": str(file.relative_to(OUT)) for file in OUT.rglob("*.md")}
    for path, place in pages.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        (OUT / place).write_text(drawn(linked(text, path)), encoding="utf-8")
    (OUT / "reference" / "cli.md").write_text(cli_page(), encoding="utf-8")
    (OUT / "reference" / "methods.md").write_text(methods_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
