"""Folders that an earlier version wrote still load, verify, go back, are exported and measured.

``tests/data/outputs_201d4db.tar.xz`` was written by that commit: a tiny Llama in bf16 (``dense``); in the moesaic
architecture CMoE (``cmoe``) and a union of token clusters (``union``); as glm4_moe CMoE with new routers (``stock``).
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.jobs.native import verify_native
from moesaic.jobs.tune import tune

ARCHIVE = Path(__file__).parent.parent / "data" / "outputs_201d4db.tar.xz"
OWN = ["cmoe", "union"]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "outputs"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("name", OWN)
def test_they_verify_and_load_with_todays_code_and_with_their_own(name: str, old: Path) -> None:
    assert moesaic.verify(old / name, baseline=old / "dense").files > 0
    moesaic.register()
    ids = torch.arange(24)[None] % 300
    today, own = (
        AutoModelForCausalLM.from_pretrained(old / name, dtype=torch.float32, trust_remote_code=trust)(ids).logits
        for trust in (False, True)
    )
    assert (today - own).abs().max() <= 1e-5 * own.abs().max()


def test_a_stock_folder_computes_what_its_blueprint_says(old: Path) -> None:
    assert moesaic.verify(old / "stock", baseline=old / "dense").files > 0
    verify_native(old / "stock", old / "dense")


@pytest.mark.parametrize("name", OWN)
def test_they_go_back_and_are_converted_again_by_their_blueprint(name: str, old: Path, tmp_path: Path) -> None:
    if name == "cmoe":
        undone = moesaic.undo(old / name, tmp_path / "undone")
        got, wanted = tensors(undone), tensors(old / "dense")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    again = moesaic.convert(old / "dense", tmp_path / "again", blueprint=old / name, target="moesaic")
    assert moesaic.Blueprint.load(old / name).digest() == again.blueprint.digest()
    shards = sorted(path.name for path in (old / name).glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert (tmp_path / "again" / shard).read_bytes() == (old / name / shard).read_bytes(), shard


def test_they_are_exported_and_tuned(old: Path, tmp_path: Path) -> None:
    source = shutil.copytree(old / "union", tmp_path / "union")
    assert moesaic.export(source, tmp_path / "stock", target="mixtral").target == "mixtral"
    train = {"steps": 2, "batch": 1, "held_out": 1, "eval_every": 2, "save_every": 2, "precision": "fp32"}
    config = {"train": train | {"data": {"tokens": 256, "window": 64}}, "loss": {"kl": 0.0, "next_token": 1.0}}
    assert tune(source, tmp_path / "tuned", config=config).target == "moesaic"
