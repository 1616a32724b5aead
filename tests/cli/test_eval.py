"""What ``moesaic eval`` makes of its flags."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.cli.main import main


def test_windows_are_no_longer_than_the_context(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "harbour.txt"
    text.write_text("Ships sail at dawn, and the harbour wakes. " * 200, encoding="utf-8")
    argv = ["moesaic", "eval", str(tiny("llama")), "--limit", "1", "--text", str(text)]
    monkeypatch.setattr(sys, "argv", [*argv, "--dtype", "fp32", "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    said = capsys.readouterr()
    assert json.loads(said.out)["protocol"].endswith(" w512 n=1]")
    assert "model  1/1" in said.err, "the window that is timed counts"
