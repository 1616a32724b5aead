"""The dense model's states from disk give the logits that the dense model gives, without running its layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.errors import InputError, ResourceError
from moesaic.jobs.tune import tune
from moesaic.tune.teacher import KeptStates
from tests.jobs.test_tune import FAST
from tests.tune.students import IDS, convert

Tiny = Callable[[str], Path]


def counted(model: Any) -> list[int]:
    """Numbers of the sequences that the first layer is given from now on."""
    rows: list[int] = []
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers[0].register_forward_pre_hook(
        lambda _m, inputs, options: rows.append(len(inputs[0] if inputs else options["hidden_states"])),
        with_kwargs=True,
    )
    return rows


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "mixtral", "granite"])
@torch.no_grad()
def test_logits_are_the_model_s_and_layers_run_once(family: str, tiny: Tiny, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    expected = model(input_ids=IDS).logits
    rows = counted(model)
    states = KeptStates(tmp_path / "states", "a model", torch.float32)
    torch.testing.assert_close(states.run(model, IDS[:1]).logits, expected[:1])
    torch.testing.assert_close(states.run(model, IDS).logits, expected)
    again = KeptStates(tmp_path / "states", "a model", torch.float32)
    assert torch.equal(again.run(model, IDS.flip(0)).logits.flip(0), states.run(model, IDS).logits)
    assert rows == [1, len(IDS) - 1]
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)  # the model itself is as before
    KeptStates(tmp_path / "states", "another", torch.float32).run(model, IDS)
    assert rows[3:] == [len(IDS)]


@torch.no_grad()
def test_a_file_cut_short_is_made_again(tiny: Tiny, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    states = KeptStates(tmp_path, "a model", torch.float32)
    expected = states.run(model, IDS).logits
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-20])
    rows = counted(model)
    torch.testing.assert_close(states.run(model, IDS).logits, expected)
    assert rows == [1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cached_recovery_learns_the_same(precision: str, tiny: Tiny, tmp_path: Path) -> None:
    """One epoch and a half: the first run reads what it wrote, the second one reads everything."""
    converted = convert(tiny("llama"), tmp_path / "moe")
    config = {"train": {**FAST["train"], "log_every": 1, "precision": precision}}

    def losses(name: str, cache: Path | None) -> list[float]:
        keys: dict[str, Any] = {"baseline": converted.dense.folder, "config": config, "teacher_cache": cache}
        done = tune(converted.folder, tmp_path / name, **keys)
        lines = [json.loads(line) for line in (done.output / "train.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    cache = tmp_path / "cache"
    plain = losses("plain", None)
    assert len(plain) == config["train"]["steps"]
    for name in ("first", "second"):
        assert losses(name, cache) == pytest.approx(plain, rel=1e-5)
    data = config["train"]["data"]
    windows = data["tokens"] // data["window"] + config["train"]["held_out"]
    assert len(list(cache.rglob("*"))) == 1 + windows  # their folder, and nothing but their files


@pytest.mark.parametrize(
    ("loss", "environment", "message"),
    [
        ({"hidden": 0.1}, {}, "no layer's output"),
        ({"kl": 0.0, "next_token": 1.0}, {}, "KL loss"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, "sharded"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused(
    loss: dict[str, float],
    environment: dict[str, str],
    message: str,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    converted = convert(tiny("llama"), tmp_path / "moe")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    keys: dict[str, Any] = {"baseline": converted.dense.folder, "config": {**FAST, "loss": loss}}
    with pytest.raises(InputError, match=message):
        tune(converted.folder, tmp_path / "out", **keys, teacher_cache=tmp_path / "cache")
    assert not list(tmp_path.glob("out*"))
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_says_so(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    converted = convert(tiny("llama"), tmp_path / "moe")
    keys: dict[str, Any] = {"baseline": converted.dense.folder, "config": FAST, "teacher_cache": tmp_path / "file"}
    with pytest.raises(InputError, match="not a folder"):
        tune(converted.folder, tmp_path / "out", **keys)
    with pytest.raises(ResourceError, match="cannot write"):
        KeptStates(tmp_path / "file" / "states", "a model", torch.float32)
