"""The commands of README and of the tutorial run as they stand there, on a tiny model."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from moesaic.cli.main import app
from tests.cli.conftest import Run
from tests.tiny_models import build_tiny

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`((?:moesaic|make) [^`]+)`")
_INSTALLS = ("git clone <this repository> && cd moesaic", ". .venv/bin/activate", "pip install .")
"""What a test of the package runs: an installation."""
PAGES = {"README.md": "MODEL", "docs/tutorial.md": "smollm2-135m"}
"""Pages, and what they call the dense model."""


def shell_lines(page: str) -> list[str]:
    """Commands of a page: its indented lines and those of fences for a shell, without comments."""
    fences = [text for kind, text in _FENCE.findall(page) if kind in ("", "sh", "bash", "console")]
    indented = [line for line in _FENCE.sub("", page).splitlines() if line.startswith("    ")]
    lines = [*indented, *"\n".join(fences).splitlines()]
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


def python_blocks(page: str) -> list[str]:
    return [text for kind, text in _FENCE.findall(page) if kind == "python"]


def verbs() -> set[str]:
    return {str(command.name) for command in app.registered_commands}


@pytest.mark.timeout(900)  # every command of a page, one after the other
@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_says_to_type_works(
    name: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    build_tiny("llama", tmp_path / PAGES[name], max_position_embeddings=1024)
    monkeypatch.chdir(tmp_path)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    ran = 0
    for line in shell_lines(page):
        first, *rest = shlex.split(line)
        if first == "make":
            assert set(rest) <= set(targets), line
        elif first != "moesaic":
            assert line in _INSTALLS, f"{name}: no test runs {line!r}"
        else:
            monkeypatch.setattr(sys, "stdin", io.StringIO("What is a harbour?\n"))
            code, _, err = run(*rest)
            assert code == 0, f"{line}: {err}"
            ran += 1
    assert ran >= 4
    for block in python_blocks(page):
        exec(compile(block, name, "exec"), {})
    capsys.readouterr()


@pytest.mark.parametrize("name", PAGES)
def test_commands_within_sentences_exist(name: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for span in _SPAN.findall((ROOT / name).read_text(encoding="utf-8")):
        first, verb, *_ = shlex.split(span)
        assert verb in (verbs() if first == "moesaic" else targets), span


def test_a_line_that_no_test_runs_is_seen() -> None:
    assert shell_lines("text\n\n    moesaic plan M  # why\n\n```sh\nrm -r OUT\n```\n```text\nrows\n```\n") == [
        "moesaic plan M",
        "rm -r OUT",
    ]
