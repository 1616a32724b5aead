"""What the command line says when it ends otherwise than a command would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

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


def test_an_interrupt_before_a_command_has_begun_is_no_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "app", interrupted)
    with pytest.raises(SystemExit) as end:
        module.main()
    assert (end.value.code, capsys.readouterr().err.splitlines()[0]) == (130, "error: interrupted")


def test_a_stream_that_cannot_write_a_letter_writes_its_number() -> None:
    code = "import sys; sys.argv[1:] = ['inspect', 'nowhere\u2603']; from moesaic.cli.main import main; main()"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "nowhere\\u2603" in ended.stderr
    assert "internal error" not in ended.stderr


_LOADING = """
import sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "moesaic.cli.main":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from moesaic.cli.start import main
main()
"""


def test_an_interrupt_while_modules_are_loaded_is_one_line() -> None:
    ended = subprocess.run([sys.executable, "-c", _LOADING], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "error: interrupted\n")


_LATE = "import atexit; from moesaic.cli.main import main; atexit.register(print, 'the interpreter ended'); main()"


@pytest.mark.parametrize(("arguments", "code"), [(["methods"], 0), (["convert", "nowhere", "out"], 1), (["--no"], 2)])
def test_one_of_several_processes_ends_at_once_and_with_its_code(
    arguments: list[str], code: int, tmp_path: Path
) -> None:
    ended = {}
    for count in ("1", "2"):
        environment = os.environ | {"WORLD_SIZE": count, "RANK": "0"}
        command = [sys.executable, "-c", _LATE, *arguments]
        ended[count] = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert ended[count].returncode == code, ended[count].stderr
    assert ended["1"].stdout == ended["2"].stdout + "the interpreter ended\n"
    assert ended["1"].stderr == ended["2"].stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_turns_into_another_error_is_still_a_signal(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch does so: an interrupt inside ``torch.tensor`` comes out as a ValueError."""

    def verb() -> None:
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            raise ValueError("could not determine the shape") from error

    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(module, "app", verb)
    monkeypatch.setattr(sys, "argv", ["moesaic"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            module.main()
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert ended.value.code == code
    assert "internal error" not in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_streams_that_the_caller_closed_are_empty(closed: str, tmp_path: Path) -> None:
    line = f"{sys.executable} -m moesaic presets {closed}; echo code $?"
    done = subprocess.run(["bash", "-c", f"({line}) 2>{tmp_path / 'err'}"], capture_output=True, text=True, timeout=120)
    assert "code 0" in done.stdout, (done.stdout, (tmp_path / "err").read_text())
    assert "internal error" not in done.stdout + (tmp_path / "err").read_text()
