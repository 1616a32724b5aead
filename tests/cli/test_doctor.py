"""What doctor says of the paths of the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moesaic.cli.doctor import examine
from moesaic.cli.main import app
from moesaic.evaluate import path_times
from moesaic.nn import moesaic_kernel
from moesaic.nn.moesaic_measured import LAYOUTS, TOKENS, measured


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for cached in (moesaic_kernel.kernel, measured):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (moesaic_kernel.kernel, measured):
        cached.cache_clear()


def test_without_a_compiler_the_lines_name_the_paths_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    report = examine()
    assert report["kernel"] == (
        "none, torch computes everything: there is no C++ compiler (no-such-compiler); CXX names one"
    )
    assert (report["one token"], report["many tokens"]) == ("path masked", "path sorted")


def test_the_lines_name_the_kernel_and_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(path_times, "SECONDS", 0.0)
    monkeypatch.setattr(path_times, "WIDTHS", (32, 64))
    before = examine()
    assert before["kernel"].startswith("compiled: ")
    assert before["one token"] == "path rows"
    assert "doctor --tune" in before["paths"]
    made = path_times.measure(torch.float32)
    assert {layout: len(names) for layout, names in made.items()} == dict.fromkeys(LAYOUTS, len(TOKENS))
    assert {name for names in made.values() for name in names} <= {"rows", "fused", "fused_sorted", "masked", "sorted"}
    monkeypatch.setattr(path_times, "measure", lambda dtype: made)
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    lines = CliRunner().invoke(app, ["doctor", "--tune"]).output.splitlines()
    threads = torch.get_num_threads()
    assert f"paths          measured for bfloat16, float32 on {threads} threads" in lines
