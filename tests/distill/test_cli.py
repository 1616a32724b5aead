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
    "distill {model} {out} --layer -1 --set pairs=[[4,4],[8,8]] --set experts=[40] --set routers=[product,full] "
    "--set rates=[1e-2] --set epochs=1 "
    "--data tiny --tokens 1280 --window 64 --processes 1 --quiet --set batch=64 --set dense_widths='[4, 32]' "
    "--set probe=null"
)


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of ``moesaic COMMAND``."""
    monkeypatch.setattr(sys, "argv", ["moesaic", *shlex.split(command)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_verb_reports_every_student(
    as_json: bool,
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = COMMAND.format(model=tiny("llama"), out=tmp_path / "out") + (" --json" if as_json else "")
    code = run(command, monkeypatch)
    printed = capsys.readouterr()
    assert not code, printed.err
    if as_json:
        found = json.loads(printed.out)
        assert found["layer"] == 1
        assert len(found["students"]) == 2 * (2 + 4)
        assert "trials" not in found
        assert len(json.loads((tmp_path / "out" / "results.json").read_text())["trials"]) == 12
    else:
        lines = printed.out.splitlines()
        assert sum(line.startswith("product p=8 m=40") for line in lines) == 2
        assert lines[0].split()[:8] == ["student", "A", "h_s", "+", "k", "w", "FVU", "real"]
        assert lines[-1].endswith("out/report.html")


def test_students_of_equal_active_size_have_a_line_each(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMAND.replace("[[4,4],[8,8]]", "[[8,8],[0,16]]").replace("product,full", "low_rank")
    more = " --set ranks='[4,8]' --set laws='[real]'"
    assert run(command.format(model=tiny("llama"), out=tmp_path / "out") + more, monkeypatch) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "low_rank" in line]
    assert {(line[1], "".join(line[5:8])) for line in lines} == {
        (rank, split) for rank in ("p=4", "p=8") for split in ("8+8", "0+16")
    }


def test_active_counts_neurons_when_experts_have_several(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMAND.replace("[[4,4],[8,8]]", "[[8,2]]").replace("product,full", "low_rank") + " --json"
    more = " --set width=4 --set laws='[real]'"
    assert run(command.format(model=tiny("llama"), out=tmp_path / "out") + more, monkeypatch) == 0
    routed = [row for row in json.loads(capsys.readouterr().out)["students"] if row["spec"]["experts"]]
    assert [(row["active"], row["spec"]["shared"], row["spec"]["top_k"]) for row in routed] == [(16, 8, 2)]
