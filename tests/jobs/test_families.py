"""Families that bring nothing new to what is computed: one conversion each, from end to end.

Methods and dtypes take turns, so that every family has one of each in some order and the suite stays short. What is
computed, read and written is tested with the other families (``tiny_models.FAMILIES``), each by each method.
``python -m benchmarks.exactness`` does all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.exactness import DTYPES, HIERARCHICAL, METHODS, exactness
from safetensors.torch import load_file, save_file

import moesaic
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.reader import Checkpoint
from moesaic.jobs.undo import undo
from tests.tiny_models import MORE_FAMILIES, MORE_MOE, build_tiny

CASES = [
    (family, usable[turn % len(usable)], DTYPES[turn // len(usable) % 2])
    for families, usable in ((MORE_FAMILIES, [*METHODS]), (MORE_MOE, [*HIERARCHICAL]))
    for turn, family in enumerate(families)
]


@pytest.mark.parametrize(("family", "method", "dtype"), CASES)
def test_a_family_is_converted_runs_and_comes_back(family: str, method: str, dtype: str, tmp_path: Path) -> None:
    found = exactness(family, method, dtype, tmp_path)
    assert found.partition
    assert found.logits <= 1e-5
    assert found.oracle <= 1e-5
    assert found.cached
    assert found.restored


@torch.inference_mode()
def test_a_moe_of_odd_widths_can_be_measured(tmp_path: Path) -> None:
    """Stock grouped products refuse its experts."""
    model = load_model(build_tiny("gpt_oss", tmp_path, d_ff=37), torch.float32)
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()


def test_what_predicts_tokens_ahead_is_left_out(tmp_path: Path) -> None:
    """Published GLM-4.5 and Qwen3-Next checkpoints hold layers that transformers does not read."""
    source = build_tiny("glm4_moe", tmp_path / "source", num_nextn_predict_layers=1)
    file = source / "model.safetensors"
    tensors = load_file(file)
    behind = {
        name.replace(".1.", ".2.", 1): tensor.clone() for name, tensor in tensors.items() if "layers.1.mlp" in name
    }
    save_file(tensors | behind | {"mtp.fc.weight": torch.ones(4, 4)}, file, {"format": "pt"})
    moesaic.convert(source, tmp_path / "out", method="mlpmoe", hierarchical=True, target="moesaic")
    back = Checkpoint(undo(tmp_path / "out", tmp_path / "dense"))
    assert set(back.names) == tensors.keys()
