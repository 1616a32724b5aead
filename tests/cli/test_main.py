"""What the command line says when it ends otherwise than a command would."""

from __future__ import annotations

import sys

import pytest
import typer

from moesaic.cli import main as module


def test_an_interrupted_command_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "app", app)
    monkeypatch.setattr(sys, "argv", ["moesaic"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines() == [
        "error: interrupted",
        "hint: the same command resumes what it had begun to write",
    ]
