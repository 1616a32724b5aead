"""Our own architecture in vLLM: what is refused, which tokens are prompts, and (`make engines`) what is computed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import moesaic
from moesaic.blueprint.layer import LayerPlan
from moesaic.checkpoint.loading import load_model, prefill_as_loaded
from moesaic.errors import UnsupportedModelError
from moesaic.evaluate.vllm import find_python
from moesaic.nn.modeling_moesaic import MoesaicConfig
from moesaic.nn.moesaic_neurons import NeuronFeedForward
from moesaic.serve.vllm_models import mixed, several
from moesaic.serve.vllm_plugin import FAMILIES, check
from tests.targets.helpers import plans_for, write
from tests.tiny_models import build_tiny

COUNT = 5
"""Tokens that are generated."""
PROMPTS = [[7, 8, 9], list(range(4, 50)), list(range(100, 121)), [*range(4, 40), 1, 2, 3]]
WIDE: dict[str, Any] = {"hidden_size": 128, "d_ff": 160, "head_dim": 32, "num_attention_heads": 4}


def settings(**changes: Any) -> Any:
    parallel = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1)
    model = SimpleNamespace(enforce_eager=True)
    plain = {"quant_config": None, "lora_config": None, "speculative_config": None}
    return SimpleNamespace(**({"parallel_config": parallel, "model_config": model} | plain | changes))


def config_of(family: str, **fields: Any) -> MoesaicConfig:
    return MoesaicConfig(text_config=AutoConfig.for_model(family), **fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_served_is_not_refused(family: str) -> None:
    check(config_of(family), settings())


@pytest.mark.parametrize(
    ("config", "vllm", "reason"),
    [
        (config_of("gemma2"), settings(), "this is gemma2"),
        (config_of("llama", attention_sites={"model.layers.0.self_attn": {}}), settings(), "pruned attention"),
        (
            config_of("llama"),
            settings(parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1)),
            "one device",
        ),
        (config_of("llama"), settings(quant_config=object()), "no quantisation"),
        (config_of("llama"), settings(lora_config=object()), "no adapters"),
        (config_of("llama"), settings(speculative_config=object()), "speculative"),
        (config_of("llama"), settings(model_config=SimpleNamespace(enforce_eager=False)), "vLLM would compile"),
    ],
)
def test_refusals_name_what_it_is(config: MoesaicConfig, vllm: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        check(config, vllm)
    assert refusal.value.hint


def test_requests_of_several_tokens_are_prompts() -> None:
    found = several(torch.tensor([0, 1, 4, 5, 7]), 9)
    assert found.tolist() == [False, True, True, True, False, True, True, False, False]
    assert several(torch.tensor([0]), 0).tolist() == []


@pytest.fixture(scope="module")
def neurons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose every neuron is an expert."""
    folder = tmp_path_factory.mktemp("neurons")
    dense = build_tiny("llama", folder / "dense", **WIDE)
    moesaic.convert(dense, folder / "out", method="neuron_experts", options={"active": 0.5})
    return folder / "out"


@torch.inference_mode()
def test_prompts_are_computed_by_the_dense_network_beside_chosen_neurons(neurons: Path) -> None:
    ffn = next(
        module for module in load_model(neurons, torch.float32).modules() if isinstance(module, NeuronFeedForward)
    )
    x_TD = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    prompt_T = torch.tensor([True, False, False, True, True, False])
    ffn.exact_prefill = True
    y_TD = mixed(ffn, x_TD, prompt_T)
    every_TD, chosen_TD = ffn(x_TD[None])[0], torch.cat([ffn(x_1D[None, None])[0] for x_1D in x_TD])
    expected_TD = torch.where(prompt_T[:, None], every_TD, chosen_TD)
    assert torch.allclose(y_TD, expected_TD, atol=1e-6)
    assert (every_TD - chosen_TD).abs().max() > 1e-3
    none_T = torch.zeros(6, dtype=torch.bool)
    assert torch.allclose(mixed(ffn, x_TD[:4], none_T[:4]), chosen_TD[:4], atol=1e-6)
    for all_T in (~none_T, none_T):  # six sequences want most neurons together
        assert torch.allclose(mixed(ffn, x_TD, all_T), every_TD, atol=1e-6)


def test_the_entry_point_names_what_registers() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["moesaic"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


# What follows runs vLLM: `make engines`.

Make = Callable[[Path], Path]


def partition(family: str) -> Make:
    def make(folder: Path) -> Path:
        own = {} if family != "qwen3" else {"hidden_size": 64, "head_dim": 32}
        dense = build_tiny(family, folder / "dense", **(WIDE | own))
        plans: Mapping[str, LayerPlan] = plans_for(dense)
        return write(dense, plans, folder / "out", "moesaic")

    return make


def union(folder: Path) -> Path:
    dense = build_tiny("qwen2", folder / "dense", **WIDE)
    options = {"split": "union", "experts": 4, "active": 0.5}
    calibration = {"tokens": 512, "window": 64}
    moesaic.convert(dense, folder / "out", method="token_clusters", options=options, calibration=calibration)
    return folder / "out"


def single_neurons(folder: Path) -> Path:
    dense = build_tiny("llama", folder / "dense", **WIDE)
    moesaic.convert(dense, folder / "out", method="neuron_experts", options={"active": 0.5})
    return folder / "out"


MADE: dict[str, Make] = {family: partition(family) for family in FAMILIES}
MADE |= {"union": union, "single neurons": single_neurons}


@pytest.mark.engines
@pytest.mark.parametrize("case", MADE)
def test_vllm_generates_as_transformers_does(case: str, tmp_path: Path) -> None:
    folder = MADE[case](tmp_path)
    delta_G = generated_apart(folder, tmp_path)
    assert len(delta_G) == 2 * len(PROMPTS) * COUNT
    assert delta_G.max() <= 1e-3


@torch.inference_mode()
def generated_apart(folder: Path, work: Path) -> torch.Tensor:
    """Largest difference of log-probabilities at every token that vLLM generated, from transformers with a cache."""
    python = find_python()
    if python is None:
        pytest.fail("name the interpreter that has vLLM in MOESAIC_VLLM_PYTHON; `make engines` does")
    (work / "prompts.json").write_text(json.dumps(PROMPTS))
    script, out = Path(__file__).with_name("vllm_served.py"), work / "found.safetensors"
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **alone, "VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [python, "-P", script, folder, work / "prompts.json", out, str(COUNT)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=280)
    found, model = load_file(out), load_model(folder, torch.float32)
    apart = []
    with prefill_as_loaded(model):
        for number, ids in enumerate(PROMPTS * 2):
            answer = model(input_ids=torch.tensor([ids]), use_cache=True)
            for token, row_V in zip(found[f"tokens.{number}"], found[f"logprobs.{number}"], strict=True):
                apart.append((answer.logits[0, -1].double().log_softmax(-1) - row_V.double()).abs().max())
                answer = model(input_ids=token.view(1, 1), past_key_values=answer.past_key_values, use_cache=True)
    return torch.stack(apart)
