"""The campaign sees faults that are planted, goes on where it stopped, and damages the same way for the same seed."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.reliability import faults
from benchmarks.reliability.__main__ import read_log
from benchmarks.reliability.cases import Inputs, content, differing, make_inputs
from benchmarks.reliability.child import Outcome, Sandbox
from benchmarks.reliability.damage import BYTE_KINDS, FOLDER_KINDS, damage_folder
from benchmarks.reliability.kills import Reference, after_stop, resume
from benchmarks.reliability.page import table, write_page

ENDED = Outcome(-9, 0.1, "", "", ())
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("reliability") / "inputs")


def test_an_output_that_is_there_and_wrong_is_a_fault(inputs: Inputs, tmp_path: Path) -> None:
    box = Sandbox(tmp_path)
    whole = Reference(content(inputs.converted), 1.0)
    assert after_stop("convert", ENDED, whole, inputs, box) == []
    out = Path(shutil.copytree(inputs.converted, box.folder / "out"))
    assert after_stop("convert", ENDED, whole, inputs, box) == []
    assert resume("convert", whole, inputs, box) == (0.0, [])
    (out / "config.json").write_text("{}")
    assert after_stop("convert", ENDED, whole, inputs, box) == ["the output is there and wrong: config.json"]
    assert resume("convert", whole, inputs, box)[1] == ["after the second run these differ: config.json"]
    (box.folder / "out.tmp").mkdir()
    assert "left: out.tmp" in after_stop("convert", ENDED, whole, inputs, box)


@forks
@pytest.mark.parametrize(
    ("disturb", "sign"),
    [
        (lambda: os.write(2, b"Traceback (most recent call last)\n"), "Traceback"),
        (lambda: os.write(2, b"error: internal error: KeyError\n"), "internal error"),
        (lambda: (faulthandler.disable(), os.abort()), "SIGABRT"),
        (lambda: os._exit(77), "exit code 77"),
    ],
)
def test_crashes_are_told_from_errors(disturb: Callable[[], object], sign: str, inputs: Inputs, tmp_path: Path) -> None:
    box = Sandbox(tmp_path)
    plain = box.run(["plan", "nowhere", "--layout", "S2A2E7"])
    assert (plain.code, plain.crash) == (1, None)
    assert plain.err.startswith("error: ")
    crash = box.run(["plan", str(inputs.dense), "--layout", "S2A2E7"], disturb).crash
    assert crash is not None
    assert sign in crash


@forks
def test_what_a_run_leaves_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.reliability.child.GRACE", 0.2)
    box = Sandbox(tmp_path)

    def leave() -> None:
        (box.temporary / "forgotten").write_text("x")
        if os.fork() == 0:
            os.execvpe("sleep", ["sleep", "60"], os.environ)

    left = box.run(["plan", "nowhere", "--layout", "S2A2E7"], leave).left
    assert left == ("process sleep 60", "temporary forgotten")


@pytest.mark.parametrize("kind", FOLDER_KINDS)
def test_damage_is_a_function_of_the_seed(kind: str, inputs: Inputs, tmp_path: Path) -> None:
    for seed in range(3):
        made = []
        for attempt in ("a", "b"):
            folder = Path(shutil.copytree(inputs.converted, tmp_path / f"{attempt}{seed}"))
            wanted, change = FOLDER_KINDS[kind]
            names = {"json": "config.json", "index": "model.safetensors.index.json"}
            file = folder / names.get(wanted, "model-00001-of-00004.safetensors")
            made.append((change(file, random.Random(seed)), file.read_bytes() if file.is_file() else b""))
        assert made[0] == made[1]
        changed = not file.is_file() or file.read_bytes() != (inputs.converted / file.name).read_bytes()
        assert changed or seed < 2
    assert BYTE_KINDS


def test_damage_takes_every_kind_of_file(inputs: Inputs, tmp_path: Path) -> None:
    files = set()
    for seed in range(40):
        folder = Path(shutil.copytree(inputs.converted, tmp_path / str(seed)))
        files.add(damage_folder(folder, random.Random(seed)).file)
    assert {"config.json", "blueprint.json", "manifest.json"} <= files
    assert any(name.endswith(".safetensors") for name in files)


def test_the_log_survives_a_torn_line_and_becomes_a_page(tmp_path: Path) -> None:
    kill = {"key": "kill convert 0", "part": "kill", "verb": "convert", "signal": "SIGKILL", "found": "partial"}
    rows = [
        {**kill, "faults": []},
        {"key": "malformed 0", "part": "malformed", "input": "dense", "seconds": 0.2, "faults": ["plan: crashed"]},
        {"key": "fuzz index 1", "part": "fuzz", "target": "index", "runs": 5000, "faults": []},
        {"key": "full disk convert done at 0.5", "part": "full disk", "verb": "convert", "faults": []},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"key": "torn')
    assert read_log(log) == rows
    assert log.read_text().endswith("}\n")
    lines = table(rows).splitlines()
    assert len(lines) == 5
    assert lines[3].split() == ["malformed", "dense", "1", "1", "0.20", "s"]
    write_page(tmp_path / "page", rows)
    assert json.loads((tmp_path / "page.json").read_text()) == rows
    assert "malformed 0: plan: crashed" in (tmp_path / "page.md").read_text()
    assert differing({"a": "1"}, {"a": "2", "b": "3"}) == ["a", "b"]


def test_a_resumed_campaign_draws_the_moments_that_it_would_have_drawn(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounds(verb: str, moments: list[int], *_: object) -> list[tuple[str, Callable[[], list[str]]]]:
        return [(str(number), list) for number in moments]

    monkeypatch.setattr(faults, "_operations", lambda *_: 500)
    monkeypatch.setattr(faults, "reference", lambda *_: Reference({}, 1.0))
    monkeypatch.setattr(faults, "PARTS", {"full disk": rounds, "read-only": rounds})

    def keys(known: set[str]) -> list[str]:
        return [row["key"] for row in faults.faults(0.1, 0, inputs, Sandbox(tmp_path), known)]

    whole = keys(set())
    first = [key for key in whole if key.startswith("full disk")]
    assert keys(set(first)) == [key for key in whole if key not in first]
    assert [key for key in keys(set(whole)) if "done" not in key] == []
