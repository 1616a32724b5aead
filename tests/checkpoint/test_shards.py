"""Weight files and index against what transformers' own save_pretrained writes for the same model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import moesaic
from moesaic.staging.writer import StagedOutput
from tests.targets.helpers import plans_for, write
from tests.tiny_models import build_tiny

SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
Tiny = Callable[[str], Path]


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())


@pytest.mark.parametrize(
    ("family", "target", "layout"),
    [
        ("llama", "moesaic", "S2A2E6"),
        ("llama", "glm4_moe", "S2A2E6"),
        ("llama", "granitemoeshared", "S2A2E6"),
        ("qwen2", "qwen2_moe", "S2A2E6"),
        ("qwen3", "qwen3_moe", "S0A2E6"),
        ("llama", "mixtral", "S0A1E5"),
    ],
)
def test_names_and_index_are_those_of_save_pretrained(
    family: str, target: str, layout: str, tiny: Tiny, tmp_path: Path
) -> None:
    dense = build_tiny(family, tmp_path / "dense", dtype="float32")  # transformers would round our fp32 routers
    ours = write(dense, plans_for(dense, layout), tmp_path / "ours", target)
    moesaic.register()
    model = AutoModelForCausalLM.from_pretrained(ours, dtype="auto")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    own, saved = index_of(ours), index_of(tmp_path / "theirs")
    count = len(set(own["weight_map"].values()))
    assert all(SHARD.fullmatch(name) for name in own["weight_map"].values())
    assert {path.name for path in ours.glob("model*.safetensors")} == {
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    }
    assert own.keys() == saved.keys()
    assert own["metadata"].keys() == saved["metadata"].keys()
    assert own["weight_map"].keys() == saved["weight_map"].keys()
    # Ours counts what is in the files; transformers leaves out buffers, such as glm4_moe's correction bias.
    buffers = sum(tensor.numel() for name, tensor in model.named_buffers() if name in own["weight_map"])
    assert own["metadata"]["total_parameters"] == saved["metadata"]["total_parameters"] + buffers
    assert own["metadata"]["total_size"] == saved["metadata"]["total_size"]
    assert all(SHARD.fullmatch(name) for name in saved["weight_map"].values())
    text = (ours / SAFE_WEIGHTS_INDEX_NAME).read_text()
    assert text == json.dumps(own, indent=2, sort_keys=True) + "\n"
    for folder in (ours, tmp_path / "theirs"):
        with safe_open(next(iter(sorted(folder.glob("model*.safetensors")))), framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_one_shard_is_a_single_file_without_index(tmp_path: Path) -> None:
    import torch

    with StagedOutput.open(tmp_path / "out", {}) as staged:
        staged.write_shard("all", {"a": torch.ones(2)})
        staged.finish()
    assert (tmp_path / "out" / SAFE_WEIGHTS_NAME).is_file()
    assert not (tmp_path / "out" / SAFE_WEIGHTS_INDEX_NAME).exists()
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == [SAFE_WEIGHTS_NAME]
