"""``moesaic distill`` from the command line."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.cli.main import main

COMMAND = (
    "distill {model} {out} --layer -1 --active 8,16 --experts 40 --routers product,full --rates 1e-2 --epochs 1 "
    "--data tiny --tokens 1280 --window 64 --processes 1 --quiet --set batch=64 --set dense_widths='[4, 32]' "
    "--set probe=null"
)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_verb_reports_every_student(
    as_json: bool,
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = COMMAND.format(model=tiny("llama"), out=tmp_path / "out") + (" --json" if as_json else "")
    monkeypatch.setattr(sys, "argv", ["moesaic", *shlex.split(command)])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert not end.value.code, printed.err
    if as_json:
        found = json.loads(printed.out)
        assert found["layer"] == 1
        assert len(found["students"]) == 2 * (2 + 4)
        assert "trials" not in found
        assert len(json.loads((tmp_path / "out" / "results.json").read_text())["trials"]) == 12
    else:
        lines = printed.out.splitlines()
        assert sum("product m=40" in line for line in lines) == 2
        assert lines[0].split()[:4] == ["student", "A", "FVU", "real"]
        assert lines[-1].endswith("out/report.html")
