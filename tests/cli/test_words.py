"""What commands say at their end, and in which order they list."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import moesaic
from moesaic.cli.console import ConsoleProgress
from moesaic.cli.pulse import Pulse
from tests.cli.conftest import Run
from tests.tiny_models import build_tiny

Tiny = Callable[[str], Path]

NEURONS = {"method": "neuron_experts", "options": {"active": 0.5}}


def test_a_conversion_ends_with_what_to_do_next(tiny: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    code, printed, err = run("convert", tiny("llama"), out)
    assert code == 0
    undo, following = printed.splitlines()[-2:]
    assert undo == f"undo: moesaic undo {out} DENSE gives the dense model back bit for bit"
    assert following == f"next: moesaic eval {out} --baseline {tiny('llama')}"
    assert err.startswith("method neuron_experts at 50% active")
    code, printed, _ = run("undo", out, tmp_path / "dense")
    assert code == 0
    for name, (options, words) in {
        "pruned": (
            ["--method", "mlpmoe", "--set", "branches=4", "--set", "keep=2"],
            "not possible, model.layers.0.mlp",
        ),
        "stock": (["--method", "random", "--target", "glm4_moe"], "not from a stock architecture"),
    }.items():
        code, printed, _ = run("convert", tiny("llama"), tmp_path / name, *options)
        assert code == 0
        assert words in printed.splitlines()[-2]


def test_layers_are_listed_by_their_number(tmp_path: Path, run: Run) -> None:
    deep = build_tiny("llama", tmp_path / "deep", num_hidden_layers=11)
    made = moesaic.convert(deep, tmp_path / "out", **NEURONS)
    _, printed, _ = run("inspect", made.output)
    layers = [int(line.split(".")[2]) for line in printed.splitlines() if line.startswith("model.layers.")]
    assert layers == list(range(11))


def test_no_hint_leads_to_a_refusal(tiny: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    made = moesaic.convert(tiny("llama"), tmp_path / "neurons", **NEURONS)
    code, _, err = run("export", made.output, tmp_path / "g.gguf")
    assert code == 1
    assert "--to gguf" not in err
    code, _, err = run("export", made.output, tmp_path / "stock")
    assert code == 1
    error, hint = err.splitlines()[-2:]
    assert error.count("every neuron is an expert") == 1, "each reason once"
    assert len(error) < 250
    assert "--target glm4_moe" in hint
    assert run("export", made.output, tmp_path / "stock", "--to", "qwen3_moe")[2].splitlines()[-2:] == [error, hint]
    _, printed, _ = run("targets", made.output)
    assert printed.count("every neuron is an expert") == 1
    assert "no stock one" in printed.splitlines()[-1]
    assert run("convert", tiny("llama"), tmp_path / "again", *hint.split(",")[0].split()[-2:])[0] == 0
    stock = moesaic.convert(tiny("llama"), tmp_path / "glm", method="random", target="glm4_moe")
    code, _, err = run("export", stock.output, tmp_path / "g.gguf")
    assert (code, "add --to gguf" in err) == (1, True)


def test_text_that_is_not_read_is_said_to_have_no_effect(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    text = ("--calib", "tiny", "--calib-tokens", "128")
    unread = "neuron_experts reads no text as it is set: --calib and --calib-tokens have no effect"
    assert f"note        {unread}" in run("plan", tiny("llama"), *text)[1].splitlines()
    assert unread in run("convert", tiny("llama"), tmp_path / "neurons", *text)[2].splitlines()
    again = ("convert", tiny("llama"), tmp_path / "again", "--blueprint", tmp_path / "neurons", "--budget", "0.25")
    code, _, err = run(*again, "--calib", "tiny")
    assert code == 0
    assert "this blueprint's budget reads no text: --calib has no effect" in err.splitlines()
    for settings in (
        ("--set", "refit=true"),
        ("--set", "choice=threshold"),
        ("--method", "cmoe", "--layout", "S2A2E8"),
    ):
        assert "no effect" not in run("plan", tiny("llama"), *text, *settings)[1]
    code, _, err = run("convert", tiny("llama"), tmp_path / "read", *text, "--set", "choice=threshold")
    assert code == 0
    assert "no effect" not in err
    assert "no effect" not in run("plan", tiny("llama"))[1]


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", (), "no stock one: model.layers.0.mlp and 1 more: every neuron is an expert"),
        ("gemma2", (), "no stock one: no stock target has GELU experts"),
        ("llama", ("--method", "mlpmoe"), "not dense: all its experts are always on"),
    ],
)
def test_no_architecture_is_named_as_if_it_had_been_asked_for(
    family: str, options: tuple[str, ...], words: str, tiny: Tiny, tmp_path: Path, run: Run
) -> None:
    code, _, err = run("convert", tiny(family), tmp_path / "out", *options)
    assert code == 0
    (line,) = [line for line in err.splitlines() if line.startswith("architecture")]
    assert line.startswith(f"architecture moesaic, {words}")


def test_names_and_texts_stand_at_the_left(run: Run) -> None:
    for verb in ("methods", "presets"):
        _, printed, _ = run(verb)
        first, *rest = printed.splitlines()
        column = first.index("what it")
        assert all(line[column - 1] == " " and line[column] != " " for line in rest)


def test_an_eta_waits_for_steps_after_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("moesaic.cli.console.time.monotonic", lambda: now[0])
    progress = ConsoleProgress()
    progress.start("layers", 30)
    assert capsys.readouterr().err == "layers  0/30\n"  # something is said at once
    for seconds in (100, 20, 22, 21):  # the first one warms up
        now[0] += seconds
        progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert ["left" in line for line in lines] == [False, False, True, True]
    minutes, _, rest = lines[-1].split(", ")[1].split(" ")[0].partition(":")
    assert 60 * int(minutes) + int(rest) == pytest.approx(26 * 21, rel=0.05)


def test_the_list_of_commands_is_not_cut_off(run: Run) -> None:
    code, printed, _ = run("--help")
    assert code == 0
    assert "..." not in printed.partition("Commands:")[2]


def test_a_plan_says_what_neuron_experts_are_and_what_to_do_next(tiny: Callable[[str], Path], run: Run) -> None:
    _, printed, _ = run("plan", tiny("llama"), "--active", "0.5")
    assert "neurons is an expert; a token uses" in printed
    assert printed.splitlines()[-1].split()[:3] == ["next", "moesaic", "convert"]
    _, printed, _ = run("plan", tiny("llama"), "--method", "random", "--layout", "S0A2E4")
    assert "shared expert" not in printed


def test_a_comparison_says_what_was_not_measured(tiny: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    made = moesaic.convert(tiny("llama"), tmp_path / "out", **NEURONS)
    _, _, err = run("compare", made.output, made.output)
    assert f"{made.output} was not measured: moesaic eval {made.output} --baseline MODEL" in err


def test_a_terminal_shows_life_while_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("moesaic.cli.pulse._SILENCE", 0.01)
    pulse = Pulse()
    pulse.watch("verifying")
    deadline = time.monotonic() + 10
    while "verifying  (" not in screen.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    pulse.hush()
    shown = screen.getvalue()
    assert shown.endswith("\r\x1b[2K"), "wiped before anything else is printed"
    time.sleep(0.1)
    assert screen.getvalue() == shown, "and silent after"


def test_no_sign_of_life_in_a_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.cli.pulse._SILENCE", 0.01)
    Pulse().watch("verifying")
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
