"""Checkpoints as others write them: buffers of old releases, heads of trainings, dtypes unlike config.json's."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.checkpoint.reader import WEIGHTS, Checkpoint
from moesaic.errors import CheckpointError, InputError
from moesaic.progress import Silent
from tests.tiny_models import build_tiny, tiny_tokenizer

Tiny = Callable[[str], Path]
EXACT = {"method": "mlpmoe", "options": {"branches": 4}}


class Notes(Silent):
    """Keeps what a user would be told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def changed(source: Path, folder: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    """A copy with other config keys and more tensors, whose names have ``__`` for a dot."""
    shutil.copytree(source, folder)
    kept = load_file(folder / WEIGHTS)
    kept |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(kept, folder / WEIGHTS, {"format": "pt"})
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | (config or {})))
    return folder


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    moesaic.register()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(input_ids=torch.arange(24)[None] * 11 % 290 + 4, use_cache=False).logits


def test_causal_masks_that_old_gpt2_files_hold_are_left_out(tiny: Tiny, tmp_path: Path) -> None:
    masks = {f"transformer__h__{layer}__attn__bias": torch.ones(1, 1, 8, 8).tril() for layer in range(2)}
    masks["transformer__h__0__attn__masked_bias"] = torch.tensor(-1e4)
    source = changed(tiny("gpt2"), tmp_path / "gpt2", **masks)
    done = moesaic.convert(source, tmp_path / "out", **EXACT)
    assert not [name for name in Checkpoint(done.output).names if name.endswith((".attn.bias", ".masked_bias"))]
    torch.testing.assert_close(logits(done.output), logits(tiny("gpt2")), rtol=1e-4, atol=1e-5)


def test_a_tensor_without_a_place_is_refused_before_the_work(tiny: Tiny, tmp_path: Path) -> None:
    source = changed(tiny("llama"), tmp_path / "model", v_head__summary__weight=torch.ones(1, 32))
    with pytest.raises(CheckpointError, match=r"v_head\.summary\.weight has no place in a llama model"):
        moesaic.convert(source, tmp_path / "out", **EXACT)
    assert not (tmp_path / "out.partial").exists()


def test_weights_are_taken_in_their_own_dtype_whatever_the_config_says(tmp_path: Path) -> None:
    fp32 = build_tiny("llama", tmp_path / "fp32", dtype="float32")
    source = changed(fp32, tmp_path / "model", {"dtype": "bfloat16", "torch_dtype": "bfloat16"})
    options = {"method": "static", "options": {"active": 0.5}, "calibration": {"tokens": 256, "window": 64}}
    done = moesaic.convert(source, tmp_path / "out", **options)
    assert done.target == "dense"
    assert done.results["native_parity"]["max_delta"] < 1e-3


@pytest.mark.parametrize("active", [2, 3])
def test_experts_times_a_number_that_16_bits_round_are_judged_as_strictly(active: int, tmp_path: Path) -> None:
    source = build_tiny("llama", tmp_path / "dense", dtype="bfloat16")
    options = {"layout": f"S0A{active}E6", "gate": "softmax_topk"}
    calibration = {"tokens": 256, "window": 64}
    done = moesaic.convert(
        source, tmp_path / "out", method="llama_moe", options=options, calibration=calibration, target="mixtral"
    )
    assert done.results["native_parity"]["exact"]
    assert done.results["native_parity"]["median"] < 1e-5


def test_a_head_of_its_own_is_kept_where_the_config_ties_it(tmp_path: Path) -> None:
    tied = build_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    embedding = load_file(tied / WEIGHTS)["model.embed_tokens.weight"]
    source = changed(tied, tmp_path / "model", lm_head__weight=embedding.flip(0).contiguous())
    expected = logits(source)
    assert float((expected - logits(tied)).abs().max()) > 0.1
    done = moesaic.convert(source, tmp_path / "out", target="granitemoeshared", **EXACT)
    torch.testing.assert_close(logits(done.output), expected, rtol=1e-3, atol=1e-4)


def test_generation_settings_that_transformers_cannot_read_stand_in_no_verbs_way(tmp_path: Path) -> None:
    source = build_tiny("llama", tmp_path / "model", dtype="bfloat16")
    (source / "generation_config.json").write_text('{"pad_token_id": [1], "eos_token_id": [0, 1]}')
    notes = Notes()
    for target in ("moesaic", "dense"):
        done = moesaic.convert(source, tmp_path / target, target=target, progress=notes, **EXACT)
        moesaic.evaluate_model(done.output, baseline=source, window=32, limit=1)
        assert (done.output / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    moesaic.verify(tmp_path / "moesaic", baseline=str(source))
    assert sum("cannot read generation_config.json" in note for note in notes.told) == 2


def test_a_token_beyond_the_embedding_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    source = build_tiny("llama", tmp_path / "model", dtype="bfloat16")
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(source)
    (tmp_path / "t.txt").write_text("an <extra> word " * 40)
    with pytest.raises(InputError, match="writes token 300, '<extra>', but the model has only 300"):
        moesaic.evaluate_model(source, text=tmp_path / "t.txt", window=32)
    calibration = {"sources": [str(tmp_path / "t.txt")], "tokens": 64, "window": 32}
    with pytest.raises(InputError, match="writes token 300, '<extra>'"):
        moesaic.convert(source, tmp_path / "out", method="static", calibration=calibration)


def test_a_blueprint_takes_no_dense_layers(tiny: Tiny, tmp_path: Path) -> None:
    made = moesaic.convert(tiny("llama"), tmp_path / "first", **EXACT)
    with pytest.raises(InputError, match="says already which layers are dense"):
        moesaic.convert(tiny("llama"), tmp_path / "out", blueprint=made.output, dense_layers=[0])
    assert not (tmp_path / "out.partial").exists()
