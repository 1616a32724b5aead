"""The one count of parameters: that of transformers, but for routers that are copies and for int8 weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moesaic
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.parameters import count_parameters
from moesaic.checkpoint.reader import WEIGHTS, Checkpoint
from moesaic.jobs.evaluate import evaluate_model
from moesaic.jobs.report import PAGE_NAME, report
from tests.cli.conftest import Run, run
from tests.tiny_models import build_tiny

Tiny = Callable[[str], Path]
__all__ = ["run"]
KINDS: list[dict[str, Any]] = [
    {"method": "neuron_experts", "options": {"active": 0.5}},
    {"method": "neuron_experts", "options": {"active": 0.5, "weights": "int8"}},
    {"method": "cmoe", "options": {"layout": "S2A2E7"}},
    {"method": "random", "options": {"layout": "S2A2E4"}, "target": "glm4_moe"},
]


@pytest.mark.parametrize("family", ["llama", "gemma3", "apertus", "gpt2", "llama_bias", "mixtral"])
@pytest.mark.parametrize("settings", KINDS[:3])
def test_it_is_that_of_transformers_or_of_the_dense_model(
    family: str, settings: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    dense = load_model(tiny(family), "auto").num_parameters()
    assert count_parameters(Checkpoint(tiny(family))) == dense
    out = moesaic.convert(tiny(family), tmp_path / "out", hierarchical=family == "mixtral", **settings).output
    copied = settings["method"] == "neuron_experts"
    assert count_parameters(Checkpoint(out)) == (dense if copied else load_model(out, "auto").num_parameters())


@pytest.mark.parametrize("settings", KINDS)
def test_every_command_says_the_same(settings: dict[str, Any], run: Run, tmp_path: Path) -> None:
    dense = build_tiny("llama", tmp_path / "dense", hidden_size=128, d_ff=512)
    out = moesaic.convert(dense, tmp_path / "out", **settings).output
    model = count_parameters(Checkpoint(out))
    found = evaluate_model(out, baseline=dense, window=64, limit=2)
    assert found["parameters"] == model
    if settings["method"] == "neuron_experts":
        assert model == found["parameters_dense"]
    report(out)
    shown = f"{model / 1e6:.1f}"
    assert re.search(rf"{shown} M.{{0,80}}parameters", (out / PAGE_NAME).read_text(), re.DOTALL)
    code, text, err = run("compare", out, out, "--json")
    assert code == 0, err
    assert set(json.loads(text)["parameters, millions"].values()) == {shown}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 4}, r"routers \d+\.\d MB in 4 bits"),
        ({"bits": 3}, r"routers \d+\.\d MB in 3 bits"),
        ({"weights": "int8"}, r"routers are the high half of the int8 weights, \d+\.\d MB"),
    ],
)
def test_plan_says_a_copy_as_bytes(options: dict[str, Any], said: str, run: Run, tiny: Tiny) -> None:
    values = [f"--set={name}={value}" for name, value in options.items()]
    code, text, err = run("plan", tiny("llama"), "--method", "neuron_experts", *values)
    assert code == 0, err
    assert re.search(rf"parameters  FFN \d+\.\d M, active \d+\.\d M, {said}\n", text)
    planned = moesaic.plan(tiny("llama"), method="neuron_experts", options=options)
    assert planned.router_parameters == 0
    assert planned.router_bytes > 0


def test_a_head_that_repeats_the_embedding_counts_once(tmp_path: Path) -> None:
    folder = build_tiny("gemma3", tmp_path / "dense")
    before = count_parameters(Checkpoint(folder))
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert count_parameters(Checkpoint(folder)) == before
    tensors["lm_head.weight"] += torch.ones(())
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert count_parameters(Checkpoint(folder)) > before
