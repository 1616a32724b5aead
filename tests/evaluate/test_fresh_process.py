"""Another process that answers token windows: what it gets, what comes back, and what is said when it stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import SafetensorError

from moesaic.errors import ResourceError, UnfinishedCheckError, VerificationError
from moesaic.evaluate.fresh_process import answers

ANSWER = """
import os, sys
from safetensors.numpy import load_file, save_file
folder, work = sys.argv[1:]
assert "moesaic" not in sys.modules
open(folder, "w").write(work)
for ids in load_file(work + "/ids.safetensors")["ids"]:
    print("a line of chatter")
    save_file({"sum": ids.sum(keepdims=True) + int(os.environ["OFFSET"]), "ids": ids}, work + "/result.safetensors")
    print("@ready", flush=True)
    sys.stdin.readline()
"""
STOP = "import sys; print('chatter'); sys.exit('first words\\nlast words')"
IDS = torch.arange(6).view(3, 2)


def command(code: str) -> list[str]:
    return [sys.executable, "-I", "-c", code]


def test_each_window_is_answered_and_nothing_stays_on_disk(tmp_path: Path) -> None:
    told = tmp_path / "work"
    windows = list(answers(command(ANSWER), told, IDS, engine="adder", environment={"OFFSET": "10"}))
    assert [int(window["sum"]) for window in windows] == [11, 15, 19]
    assert torch.equal(torch.stack([window["ids"] for window in windows]), IDS)
    assert not Path(told.read_text()).exists()
    assert "OFFSET" not in os.environ


def test_a_process_that_is_left_early_is_ended(tmp_path: Path) -> None:
    windows = answers(command(ANSWER), tmp_path / "work", IDS, engine="adder", environment={"OFFSET": "0"})
    next(windows)
    work = Path((tmp_path / "work").read_text())
    assert work.exists()
    windows.close()
    assert not work.exists()


def test_a_process_that_dies_between_two_windows_is_reported(tmp_path: Path) -> None:
    dying = ANSWER.replace("sys.stdin.readline()", "sys.exit('out of memory')")
    windows = answers(command(dying), tmp_path / "work", IDS, engine="adder", environment={"OFFSET": "0"})
    next(windows)
    time.sleep(1)  # it is gone when it is spoken to
    with pytest.raises(VerificationError, match="out of memory"):
        next(windows)


@pytest.mark.parametrize(("code", "words"), [(STOP, "last words"), ("raise SystemExit(0)", "without a message")])
def test_a_process_that_stops_is_quoted(code: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=f"adder cannot run .*{words}"):
        list(answers(command(code), tmp_path, IDS, engine="adder"))


@pytest.mark.parametrize(("number", "unfinished"), [(signal.SIGKILL, True), (signal.SIGABRT, False)])
def test_a_check_that_was_killed_may_be_tried_again(number: signal.Signals, unfinished: bool, tmp_path: Path) -> None:
    code = f"import os; os.kill(os.getpid(), {int(number)})"
    with pytest.raises(VerificationError, match=number.name) as caught:
        list(answers(command(code), tmp_path, IDS, engine="adder"))
    assert isinstance(caught.value, UnfinishedCheckError) == unfinished


OWNER = """
import sys
from pathlib import Path
import torch
from moesaic.evaluate.fresh_process import answers
next(answers(sys.argv[2:], Path(sys.argv[1]), torch.arange(6).view(3, 2), engine="adder"))
"""
BUSY = """
import os, subprocess, sys, time
folder, work = sys.argv[1:]
more = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(folder, "w").write(f"{work} {os.getpid()} {more.pid}")
time.sleep(600)  # as a program that loads a large model: it hears nothing
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_owner(number: signal.Signals, tmp_path: Path) -> None:
    told = tmp_path / "told"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(told), *command(BUSY)])
    deadline = time.monotonic() + 60
    while len(told.read_text().split() if told.exists() else ()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    work, *programs = told.read_text().split()
    assert Path(work).exists()
    owner.send_signal(number)
    owner.wait()
    running = [True]
    while any(running) or Path(work).exists():
        assert time.monotonic() < deadline, "something was left"
        time.sleep(0.02)
        running = [psutil.pid_exists(int(one)) and psutil.Process(int(one)).status() != "zombie" for one in programs]


def test_no_room_for_temporary_files_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("moesaic.evaluate.fresh_process.save_file", full)
    with pytest.raises(ResourceError, match="No space left"):
        next(iter(answers([sys.executable, "-c", ""], tmp_path, torch.zeros(1, 2, dtype=torch.long), engine="none")))
