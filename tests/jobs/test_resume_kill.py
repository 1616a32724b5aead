"""``moesaic convert`` killed with SIGKILL at random moments and run again: OUT is absent or complete, and the same."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.staging.manifest import UNHASHED, check_manifest
from tests.in_memory import memory_folder
from tests.tiny_models import build_tiny

REPOSITORY = Path(__file__).parents[2]
KILLS = 20
TEXT = "One expert reads, the others rest; a router in between decides which of them it is. " * 40

Cli = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def cli() -> Iterator[Cli]:
    """``cli(*args, fork=True, kill_after=None)``: runs the command line; returns exit code and CPU seconds."""
    command = [sys.executable, "-m", "tests.jobs.forking_cli"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def run(*args: str | Path, **how: Any) -> dict[str, Any]:
            request = {"args": [str(arg) for arg in args], "fork": True, "kill_after": None} | how
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            return json.loads(stdout.readline())

        yield run
        stdin.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


def fixed_files(folder: Path) -> dict[str, bytes]:
    """All files of an output that must not differ between two runs."""
    names = UNHASHED - {"manifest.json"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in names
    }


def test_killed_at_random_moments_and_resumed(cli: Cli, folder: Path) -> None:
    model = build_tiny("llama", folder / "model", num_hidden_layers=3)
    (folder / "text.txt").write_text(TEXT)
    out, partial = folder / "out", folder / "out.partial"
    settings = ("--layout", "S2A2E7", "--calib", folder / "text.txt", "--calib-tokens", "256", "--calib-window", "64")

    def convert(target: Path, **how: Any) -> dict[str, Any]:
        return cli("convert", model, target, *settings, "--quiet", **how)

    assert convert(folder / "first", fork=False)["code"] == 0
    whole = convert(folder / "reference")
    assert whole["code"] == 0
    reference = fixed_files(folder / "reference")
    assert fixed_files(folder / "first") == reference

    dice, killed, steps = random.Random(0), 0, []
    for attempt in range(3 * KILLS):  # a run may be over before its moment comes: that one does not count
        moment = whole["seconds"] * (attempt % KILLS + dice.random()) / KILLS
        code = convert(out, kill_after=moment)["code"]
        killed += code == -9
        if out.exists():
            check_manifest(out)
        else:
            progress = partial / "progress.jsonl"
            steps += [len(progress.read_bytes().splitlines()) if progress.exists() else 0]
            assert convert(out)["code"] == 0
        assert fixed_files(out) == reference, f"killed after {moment:.3f} s"
        assert not partial.exists() or not (partial / "model").exists()
        shutil.rmtree(out)
        shutil.rmtree(partial, ignore_errors=True)
        if killed == KILLS:
            break
    assert killed == KILLS
    assert sum(step > 0 for step in steps) >= 3, "the kills never met an unfinished run with finished steps"
    assert len(set(steps)) >= 3, "the kills met the run in the same place"

    moesaic.register()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "reference")
    with torch.inference_mode():
        assert torch.isfinite(loaded(input_ids=torch.arange(8)[None]).logits).all()


def test_chain_of_kills_ends_in_the_same_bytes(cli: Cli, folder: Path) -> None:
    model = build_tiny("gpt2", folder / "model", n_layer=5)

    def convert(target: Path, **how: Any) -> dict[str, Any]:
        return cli("convert", model, target, "--method", "mlpmoe", "--set", "branches=5", "--quiet", **how)

    assert convert(folder / "first", fork=False)["code"] == 0
    whole = convert(folder / "reference")
    dice, out = random.Random(1), folder / "out"
    for _ in range(KILLS):
        convert(out, kill_after=whole["seconds"] * dice.uniform(0.2, 0.7))
        if out.exists():
            break
    else:
        assert convert(out)["code"] == 0
    assert fixed_files(out) == fixed_files(folder / "reference")
