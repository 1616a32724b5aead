"""A checkpoint in another dtype."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.checkpoint.cast import cast_copy
from moesaic.checkpoint.reader import Checkpoint
from tests.tiny_models import build_tiny


def test_every_weight_is_rounded_once_and_everything_else_is_kept(tmp_path: Path) -> None:
    source = build_tiny("llama", tmp_path / "source", dtype="float32", max_shard_size="20KB")
    out = cast_copy(source, tmp_path / "out", "bfloat16")
    dense, cast = Checkpoint(source), Checkpoint(out)
    assert set(cast.names) == set(dense.names)
    for name in dense.names:
        assert torch.equal(cast.tensor(name), dense.tensor(name).bfloat16())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out)("the expert") == AutoTokenizer.from_pretrained(source)("the expert")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert cast_copy(source, out, "bfloat16") == out
    assert (out / "model.safetensors").stat().st_mtime_ns == written
