"""The staged writer: what it writes, what it refuses, and what it takes up from an interrupted run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, ResourceError, UnfinishedCheckError, VerificationError
from moesaic.staging.manifest import check_manifest
from moesaic.staging.writer import LOCK_NAME, StagedOutput
from tests.staging.staged_job import KEY, PLAN, SHARDS, STEPS, job, tree


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    out = tmp_path_factory.mktemp("reference") / "out"
    job(out)
    return tree(out)


def test_output_is_a_complete_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert job(out) == list(STEPS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    names = [f"model-{i:05d}-of-00003.safetensors" for i in range(1, 4)]
    expected = {
        *names,
        "model.safetensors.index.json",
        "config.json",
        "manifest.json",
        "results.json",
        "extra/code.txt",
    }
    assert tree(out).keys() == expected
    checkpoint = Checkpoint(out)
    for step, tensors in SHARDS.items():
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.tensor(name), tensor), step
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 3 * 15, "total_size": 3 * 15 * 4}
    assert index["weight_map"]["rest.bias"] == names[-1]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["key"] == KEY
    assert manifest["files"].keys() == expected - {"manifest.json", "results.json"}


def test_one_shard_is_called_model_safetensors(tmp_path: Path) -> None:
    with StagedOutput.open(tmp_path / "out", KEY) as staged:
        staged.write_shard("rest", SHARDS["rest"])
        staged.finish(manifest=False)
    assert tree(tmp_path / "out").keys() == {"model.safetensors"}


def test_two_runs_write_equal_bytes(tmp_path: Path) -> None:
    job(tmp_path / "a")
    job(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


# -- what an interrupted run left ----------------------------------------------------------------------------------


def interrupted(out: Path, steps: int = 2) -> Path:
    """A staging folder with ``steps`` steps done; returns it."""

    def stop(step: str) -> None:
        if step == STEPS[steps - 1]:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        job(out, stop)
    assert not out.exists()
    return out.with_name(f"{out.name}.partial")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ({**KEY, "source": "b" * 64}, 'source was "aaaaaaaaaaaaaaa...aaa", now "bbbbbbbbbbbbbbb...bbb"'),
        ({**KEY, "options": {"layout": "S2A2E8", "markers": 10}}, 'options.layout was "S3A3E8", now "S2A2E8"'),
        ({**KEY, "seed": 1}, "seed was null, now 1"),
        ({"source": "a" * 64}, "method was"),
    ],
)
def test_another_key_is_refused_and_names_what_changed(tmp_path: Path, key: dict[str, Any], words: str) -> None:
    out = tmp_path / "out"
    partial = interrupted(out)
    before = tree(partial)
    with pytest.raises(InputError) as refused:
        job(out, key=key)
    assert words in refused.value.message
    assert "--restart" in refused.value.hint
    assert tree(partial) == before
    with StagedOutput.open(out, key, restart=True) as staged:
        assert not staged.done(STEPS[0])
        assert staged.read_state() is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "plans", "line"])
def test_damaged_shard_is_done_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, complete: dict[str, bytes]
) -> None:
    partial = interrupted(tmp_path / "out", 2)
    shard = partial / "shards" / "layer-00001.safetensors"
    if damage == "truncate":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "flip":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    elif damage == "delete":
        shard.unlink()
    elif damage == "plans":
        (partial / "plans" / "layer-00001" / "blueprint.json").write_text("{}")
    else:
        lines = (partial / "progress.jsonl").read_bytes().splitlines(keepends=True)
        (partial / "progress.jsonl").write_bytes(b"".join(lines[:3]) + b"\x00" * len(lines[3]) + b"\n")
    assert job(tmp_path / "out") == ["layer-00001", "rest"]
    assert ("layer-00001" in caplog.text) == (damage != "line")
    assert tree(tmp_path / "out") == complete


def test_state_is_forgotten_when_a_step_before_it_is(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "out", 2)
    with StagedOutput.open(tmp_path / "out", KEY) as staged:
        state = staged.read_state()
        assert state is not None
        assert state[0] == 1
        assert torch.equal(state[1]["x"], torch.full((5,), 0.0))
    (partial / "shards" / "layer-00000.safetensors").unlink()
    with StagedOutput.open(tmp_path / "out", KEY) as staged:
        assert staged.read_state() is not None, "the decisions, on which it stands, are still there"
    (partial / "plans" / "layer-00000" / "blueprint.json").unlink()
    with StagedOutput.open(tmp_path / "out", KEY) as staged:
        assert staged.read_state() is None


def test_damaged_state_is_forgotten(tmp_path: Path, complete: dict[str, bytes]) -> None:
    partial = interrupted(tmp_path / "out", 2)
    (partial / "state.safetensors").write_bytes(b"\x00" * 20)
    assert job(tmp_path / "out") == ["rest"]
    assert tree(tmp_path / "out") == complete


def test_damaged_key_asks_for_restart(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "out")
    (partial / "key.json").write_text("{")
    with pytest.raises(InputError, match="--restart"):
        job(tmp_path / "out")


def test_nothing_is_left_when_nothing_was_done(tmp_path: Path) -> None:
    def fail_early() -> None:
        with StagedOutput.open(tmp_path / "out", KEY) as staged:
            staged.write_text("config.json", "{}")
            raise RuntimeError("early")

    with pytest.raises(RuntimeError, match="early"):
        fail_early()
    assert not list(tmp_path.iterdir())


def test_decisions_outlive_a_run_without_their_shard(tmp_path: Path) -> None:
    def stop_early() -> None:
        with StagedOutput.open(tmp_path / "out", KEY) as staged:
            staged.write_plans("layer-00000", PLAN, {"agreement": 0.5})
            staged.write_plans("layer-00001", PLAN)
            staged.write_state(2, {})
            raise RuntimeError("early")

    with pytest.raises(RuntimeError, match="early"):
        stop_early()
    damaged = tmp_path / "out.partial" / "plans" / "layer-00001" / "blueprint.json"
    damaged.write_text(damaged.read_text() + " ")
    with StagedOutput.open(tmp_path / "out", KEY) as staged:
        assert [staged.planned(f"layer-0000{n}") for n in range(3)] == [True, False, False]
        assert not staged.done("layer-00000")
        plans, reports, _ = staged.read_plans("layer-00000")
        assert plans.keys() == PLAN.keys()
        assert reports == {"agreement": 0.5}
        assert staged.read_state() is None, "it stands on decisions that are gone"


@pytest.mark.parametrize("error", [UnfinishedCheckError, VerificationError])
def test_only_a_check_that_came_to_no_end_leaves_something(
    error: type[VerificationError], tmp_path: Path, complete: dict[str, bytes]
) -> None:
    def refuse(folder: Path) -> None:
        assert check_manifest(folder) > 0
        raise error("wrong logits")

    def convert() -> None:
        with StagedOutput.open(tmp_path / "out", KEY) as staged:
            for step in STEPS:
                staged.write_plans(step, PLAN)
                staged.write_shard(step, SHARDS[step])
            staged.write_text("config.json", "{}")
            staged.finish(verify=refuse)

    with pytest.raises(VerificationError, match="wrong logits"):
        convert()
    kept = error is UnfinishedCheckError
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"] * kept
    assert job(tmp_path / "out") == ([] if kept else list(STEPS))
    assert tree(tmp_path / "out") == complete


def test_results_hold_what_verification_added(tmp_path: Path) -> None:
    results: dict[str, Any] = {}
    with StagedOutput.open(tmp_path / "out", KEY) as staged:
        staged.write_shard("rest", SHARDS["rest"])
        staged.finish(results=results, verify=lambda folder: results.update(parity=1e-7))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == {"parity": 1e-7}


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    with StagedOutput.open(tmp_path / "out", KEY) as staged:
        staged.write_shard("a", {"w": torch.zeros(1)})
        staged.write_shard("b", {"w": torch.zeros(1)})
        with pytest.raises(VerificationError, match="tensor w was written twice"):
            staged.finish()


# -- where an output may go ----------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model in it, links, a file and a read-only folder; also the home and the current folder."""
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "foreign.partial").mkdir()
    (tmp_path / "foreign.partial" / "thesis.txt").write_text("x")
    (tmp_path / "linked.partial").symlink_to(tmp_path / "full")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "to_model").symlink_to(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("full", "output .*full exists"),
        ("full/", "output .*full exists"),
        ("~/full", "output .*full exists"),
        ("file", "exists and is a file"),
        ("dangling", "is a link"),
        ("model", "is the model itself"),
        ("to_model", "is the model itself"),
        ("model/out", "inside the model folder"),
        ("model/sub/out", "inside the model folder"),
        ("to_model/out", "inside the model folder"),
        ("./x/../model/out", "inside the model folder"),
        (".", "the model .* lies inside the output"),
        ("..", "the model .* lies inside the output"),
        ("/", "cannot be an output folder"),
        ("", "it is empty"),
        ("missing/out", "missing does not exist"),
        ("file/out", "file is not a folder"),
        ("foreign", "foreign.partial is in the way"),
        ("linked", "linked.partial is in the way"),
        ("a\0b", "null"),
        ("n" * 250, "File name too long"),
        ("/proc/out", "cannot create /proc/out"),
        ("~no_such_user/out", "home directory"),
    ],
)
def test_output_that_cannot_be_is_refused_and_nothing_written(place: Path, out: str, words: str) -> None:
    before = sorted(place.rglob("*"))
    with pytest.raises(InputError, match=words), StagedOutput.open(out, KEY, source="model"):
        pass
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("out", ["out/", "./out", "~/out", "full/../out", "model/../out"])
def test_spellings_of_an_output(place: Path, out: str) -> None:
    StagedOutput.check(out, "model")
    with StagedOutput.open(out, KEY, source="~/model") as staged:
        staged.write_shard("rest", SHARDS["rest"])
        assert staged.finish() == place / "out"
    assert load_file(place / "out" / "model.safetensors").keys() == SHARDS["rest"].keys()


def test_complete_output_is_named_as_such(tmp_path: Path) -> None:
    job(tmp_path / "out")
    with pytest.raises(InputError, match="exists and is complete"):
        StagedOutput.check(tmp_path / "out")


def test_unfinished_output_is_kept_when_another_conversion_finished_it(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists"):
        job(tmp_path / "out")
    assert (partial / "progress.jsonl").exists()


def test_too_little_disk_is_refused_before_work(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match=r"needs about .* GB more"),
        StagedOutput.open(tmp_path / "out", KEY, expected_bytes=10**18),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_full_disk_in_the_callers_own_writes_is_a_resource_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match="No space left"),
        StagedOutput.open(tmp_path / "out", KEY),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_other_errors_of_the_caller_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), StagedOutput.open(tmp_path / "out", KEY):
        (tmp_path / "nothing").read_text()


def test_file_names_stay_inside(tmp_path: Path) -> None:
    with StagedOutput.open(tmp_path / "out", KEY) as staged:
        for name in ("../config.json", "/etc/passwd", "a/../../b"):
            with pytest.raises(InputError, match="leads outside"):
                staged.write_text(name, "x")
        with pytest.raises(ValueError, match="file name"):
            staged.write_shard("../x", SHARDS["rest"])


def test_copied_link_becomes_a_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"tokenizer")
    (tmp_path / "tokenizer.json").symlink_to("blob")
    with StagedOutput.open(tmp_path / "out", KEY) as staged:
        staged.write_shard("rest", SHARDS["rest"])
        staged.copy_file(tmp_path / "tokenizer.json")
        staged.finish()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"tokenizer"


def test_lock_file_does_not_reach_the_output(tmp_path: Path) -> None:
    job(tmp_path / "out")
    assert LOCK_NAME not in tree(tmp_path / "out")
