"""Sentences are counted as a reader would, and what is no prose is left out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import readability

PAGE = """# A heading of many words that is no sentence at all

One two three. Four [five six](somewhere.md) seven
eight!

| a table | of words |
|---|---|

* An item without a full stop
* `code here` counts as one

    indented code is no sentence

```
Nor is this. Nor this.
```
"""


def test_sentences_and_their_words() -> None:
    found = readability.sentences(PAGE)
    assert [readability.words(sentence) for sentence in found] == [3, 5, 6, 4]


def test_too_long_is_said_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert readability.main([str(page), "--mean", "16", "--longest", "30"]) == 0
    assert readability.main([str(page), "--longest", "5"]) == 1
    assert "6: An item without a full stop" in capsys.readouterr().out
    assert readability.main([str(page), "--mean", "4"]) == 1
