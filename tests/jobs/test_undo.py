"""Undo gives back the dense checkpoint, bit for bit, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moesaic.anatomy import FAMILIES as FAMILIES_BY_TYPE
from moesaic.blueprint.layer import LayerPlan, Router, WeightFade
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.reader import Checkpoint
from moesaic.cli.main import app
from moesaic.errors import InputError, VerificationError
from moesaic.jobs.convert import convert
from moesaic.jobs.undo import undo, what_is_lost
from moesaic.staging.writer import StagedOutput
from tests.tiny_models import FAMILIES, MOE_FAMILIES, MOE_VARIANTS, VARIANTS, build_tiny

LAYOUT = {"layout": "S2A2E7"}


def converted(source: Path, out: Path, method: str = "random", **options: Any) -> Path:
    moe = FAMILIES_BY_TYPE[Checkpoint(source).config["model_type"]].moe is not None
    return convert(source, out, method=method, options=options or LAYOUT, hierarchical=moe, target="moesaic").output


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS, *MOE_FAMILIES, *MOE_VARIANTS])
def test_every_family_comes_back_bit_for_bit(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = Checkpoint(tiny(family))
    dense = Checkpoint(undo(converted(source.folder, tmp_path / "moe"), tmp_path / "dense"))
    assert set(dense.names) == set(source.names)
    for name in source.names:
        assert dense.tensor(name).dtype == source.tensor(name).dtype
        assert torch.equal(dense.tensor(name), source.tensor(name)), name
    assert dense.config == source.config
    assert [path.read_bytes() for path in dense.side_files()] == [path.read_bytes() for path in source.side_files()]
    weights = {path.name for path in dense.folder.glob("*.safetensors*")}
    others = {path.name for path in dense.folder.iterdir()} - weights
    assert others == {"config.json", *(path.name for path in source.side_files())}


def test_bf16_and_several_source_shards(tmp_path: Path) -> None:
    source = Checkpoint(build_tiny("phi3", tmp_path / "source", dtype="bfloat16", max_shard_size="20KB"))
    assert len(source.files) > 1
    dense = Checkpoint(undo(converted(source.folder, tmp_path / "moe"), tmp_path / "dense"))
    assert all(torch.equal(dense.tensor(name), source.tensor(name)) for name in source.names)


def test_config_json_is_byte_for_byte_the_source(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("qwen2")
    dense = undo(converted(source, tmp_path / "moe"), tmp_path / "dense")
    assert (dense / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_layers_left_dense_come_back_too(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = Checkpoint(tiny("llama"))
    convert(source.folder, tmp_path / "moe", method="random", options=LAYOUT, dense_layers=(0,), target="moesaic")
    dense = Checkpoint(undo(tmp_path / "moe", tmp_path / "dense"))
    assert all(torch.equal(dense.tensor(name), source.tensor(name)) for name in source.names)


def test_static_slicing_of_mlpmoe_comes_back(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = Checkpoint(tiny("gpt2"))
    dense = Checkpoint(undo(converted(source.folder, tmp_path / "moe", "mlpmoe", branches=5), tmp_path / "dense"))
    assert all(torch.equal(dense.tensor(name), source.tensor(name)) for name in source.names)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("static", LAYOUT, "kept only 22 of 37 neurons"),
        ("mlpmoe", {"branches": 4, "fade_max": 0.4}, "fade"),
        ("mlpmoe", {"branches": 4, "keep": 3}, "has scaled down projections"),
    ],
)
def test_lossy_conversions_are_refused_with_the_reason(
    tiny: Callable[[str], Path], tmp_path: Path, method: str, options: dict[str, Any], words: str
) -> None:
    folder = converted(tiny("llama"), tmp_path / "moe", method, **options)
    with pytest.raises(InputError, match=words) as refused:
        undo(folder, tmp_path / "dense")
    assert "model.layers.0.mlp" in refused.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


BASE = LayerPlan(4, torch.tensor([1]), (torch.tensor([0, 2]), torch.tensor([3, -1])), 1, Router("linear", {}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"fade": WeightFade((0.1, 0.2))}, "fade"),
        ({"expert_scale": torch.ones(2)}, "scaled"),
        ({"readout": torch.ones(2, 5)}, "refitted down"),
        ({"bias": torch.ones(2)}, "output bias"),
        ({"shared": torch.tensor([-1])}, "kept only 3 of 4"),
        ({"shared": torch.tensor([1, 1])}, "more than once"),
    ],
)
def test_what_is_lost(changes: dict[str, Any], reason: str | None) -> None:
    found = what_is_lost(replace(BASE, **changes))
    assert found is None if reason is None else found is not None and reason in found


def test_damaged_conversion_is_not_undone(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = converted(tiny("llama"), tmp_path / "moe")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(VerificationError, match=shard.name):
        undo(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_dense_models_and_foreign_folders_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an output of moesaic convert"):
        undo(tiny("llama"), tmp_path / "dense")
    with pytest.raises(InputError, match="is not a folder"):
        undo(tmp_path / "nothing", tmp_path / "dense")
    folder = converted(tiny("llama"), tmp_path / "moe")
    with pytest.raises(InputError, match="inside the model folder"):
        undo(folder, folder / "dense")


def test_interrupted_undo_resumes(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted(tiny("llama"), tmp_path / "moe")
    write_shard = StagedOutput.write_shard
    fresh: list[str] = []

    def interrupt(staged: StagedOutput, step: str, tensors: Any) -> None:
        if len(fresh) == 1 and not resumed:
            raise KeyboardInterrupt
        fresh.append(step)
        write_shard(staged, step, tensors)

    monkeypatch.setattr(StagedOutput, "write_shard", interrupt)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        undo(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    resumed = True
    undo(folder, tmp_path / "dense")
    assert fresh == ["shard-00000", "shard-00001", "shard-00002"]
    assert Checkpoint(tmp_path / "dense").config["model_type"] == "llama"


def test_an_unfinished_undo_of_another_folder_can_be_thrown_away(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (converted(tiny(family), tmp_path / family) for family in ("llama", "qwen2"))
    with monkeypatch.context() as patch:
        patch.setattr(StagedOutput, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            undo(first, tmp_path / "dense")
    command = ["undo", str(second), str(tmp_path / "dense")]
    refused = CliRunner().invoke(app, command)
    assert "--restart" in refused.exception.hint  # type: ignore[union-attr]
    assert CliRunner().invoke(app, [*command, "--restart"]).exit_code == 0
    assert Checkpoint(tmp_path / "dense").config["model_type"] == "qwen2"


def test_copy_of_the_folder_elsewhere_is_undone(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = converted(tiny("llama"), tmp_path / "moe")
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    (moved / "results.json").unlink()
    (moved / "README.md").write_text("my notes")
    assert json.loads((undo(moved, tmp_path / "dense") / "config.json").read_text())["model_type"] == "llama"
    assert Blueprint.load(moved).method == "random"
