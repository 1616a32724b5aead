"""Curves are drawn from the log of a run; a log with a torn last line still serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.errors import InputError
from moesaic.train.loop import LOG_NAME, read_log
from moesaic.train.plots import plot_curves
from tests.train.tasks import run


def test_curves_of_a_run_become_an_image(tmp_path: Path) -> None:
    run(tmp_path / "run")
    with (tmp_path / "run" / LOG_NAME).open("a") as log:
        log.write('{"step": 13, "lo')
    assert len(read_log(tmp_path / "run")) == 13
    image = plot_curves(tmp_path / "run", tmp_path / "curves.svg", ["first", "never logged"])
    text = image.read_text()
    assert "<svg" in text
    assert text.count("axes_") >= 3


def test_a_run_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no lines"):
        plot_curves(tmp_path, tmp_path / "curves.png")
