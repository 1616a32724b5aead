"""vLLM: where it is looked for, what it is known to get wrong, and (`make engines`) what it makes of our folders."""

from __future__ import annotations

import json
import stat
import sys
import venv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moesaic.blueprint.layer import Router
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, VerificationError
from moesaic.evaluate.engine_parity import WINDOW, EngineParity
from moesaic.evaluate.llama_cpp import stock_logits
from moesaic.evaluate.native_parity import parity_ids
from moesaic.evaluate.vllm import (
    PYTHON_VARIABLE,
    find_python,
    otherwise_in_vllm,
    vllm_differences,
    vllm_parity,
    vllm_version,
)
from moesaic.evaluate.vllm_child import fill
from moesaic.targets.base import TargetOptions
from tests.targets.helpers import IDS, plan_of, plans_for, write
from tests.targets.test_matrix import CASES, PAIRS
from tests.tiny_models import D_MODEL, TINY, build_tiny

Tiny = Callable[[str], Path]


def test_the_interpreter_is_the_one_named_then_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, other = tmp_path / "python", tmp_path / "other"
    for path in (named, other):
        path.touch()
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("MOESAIC_VLLM_PYTHON", str(other))
    assert find_python(named) == named
    assert find_python() == other
    monkeypatch.setenv("MOESAIC_VLLM_PYTHON", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="absent is no Python interpreter"):
        find_python()
    with pytest.raises(InputError, match="is no Python interpreter"):
        find_python(tmp_path)


def test_an_interpreter_without_vllm_is_told_from_one_with_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    bare = tmp_path / "bare" / "bin" / "python"
    with pytest.raises(InputError, match="has no vLLM"):
        vllm_version(bare)
    with pytest.raises(VerificationError, match=r"vLLM cannot run .*No module named"):
        vllm_differences(tiny("llama"), IDS, stock_logits(tiny("llama")), python=bare)
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # what find_spec sees where it is not installed
    with pytest.raises(InputError, match="vLLM is not installed"):
        vllm_parity(tiny("llama"), IDS, stock_logits(tiny("llama")))


def test_a_flat_list_is_spread_over_the_vocabulary() -> None:
    # As vLLM lists it: nothing before the first token; then the token that follows, and all tokens, best first.
    listed = SimpleNamespace(
        start_indices=[0, 0, 4],
        end_indices=[0, 4, 8],
        token_ids=[2, 1, 0, 2, 1, 2, 1, 0],
        logprobs=[-3.0, -1.0, -2.0, -3.0, -2.5, -1.5, -2.5, -3.5],
    )
    rows_WV = np.full((2, 3), np.nan, np.float32)
    fill(rows_WV, listed, first=1)
    assert rows_WV.tolist() == [[-2.0, -1.0, -3.0], [-3.5, -2.5, -1.5]]


PLAIN = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("model_type", "config", "biases", "word"),
    [
        ("glm4_moe", {"head_dim": 32}, {"q_proj": 1.0}, None),
        ("glm4_moe", {"tie_word_embeddings": True}, {}, "tied"),
        ("qwen2_moe", {}, {"q_proj": 0.0}, None),
        ("qwen2_moe", {}, {}, "biases"),
        ("qwen2_moe", {"head_dim": 32}, {"q_proj": 1.0}, "head_dim"),
        ("granitemoeshared", {}, {}, None),
        ("granitemoeshared", {}, {"k_proj": 1.0, "o_proj": 0.0}, "k_proj.bias"),
        ("granitemoeshared", {"head_dim": 32}, {}, "head_dim"),
        ("ernie4_5_moe", {}, {"q_proj": 1.0, "o_proj": 0.0}, None),
        ("ernie4_5_moe", {}, {"o_proj": 1.0}, "o_proj.bias"),
        ("qwen3_moe", {}, {"q_proj": 1.0}, None),
        ("qwen3_moe", {}, {"o_proj": 1.0}, "o_proj.bias"),
        ("mixtral", {"head_dim": 32}, {}, None),
    ],
)
def test_what_vllm_gets_wrong_is_known_beforehand(
    model_type: str, config: dict[str, Any], biases: dict[str, float], word: str | None, tmp_path: Path
) -> None:
    tensors = {f"model.layers.0.self_attn.{name}.bias": torch.full((4,), value) for name, value in biases.items()}
    save_file(tensors | {"lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | config | {"model_type": model_type}))
    reason = otherwise_in_vllm(Checkpoint(tmp_path))
    assert (reason is None) == (word is None)
    assert (word or "") in (reason or "")


# What follows runs vLLM: `make engines`.


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    python = find_python()
    if python is None:
        pytest.fail("name the interpreter that has vLLM in MOESAIC_VLLM_PYTHON; `make engines` does")
    return python


def for_vllm(case: str, folder: Path, dtype: str = "bfloat16") -> Path:
    """The tiny model of a case of the matrix, with heads of 32 or more: vLLM's attention for CPUs has no narrower."""
    family, config, _ = CASES[case]
    head_dim = {**TINY[family].config, **config}.get("head_dim")
    config = {"hidden_size": 4 * D_MODEL, "d_ff": 160, **config}
    if family == "qwen3":
        config |= {"hidden_size": 64, "head_dim": 32}
    elif head_dim is not None:
        config["head_dim"] = 4 * head_dim
    if "longrope" in str(config):  # a factor for every second one of the 24 rotated dimensions
        factors = {"short_factor": [1 + i / 12 for i in range(12)], "long_factor": [4 + i / 12 for i in range(12)]}
        config["rope_parameters"] = {**config["rope_parameters"], **factors}
    return build_tiny(family, folder, dtype=dtype, **config)


def compared(folder: Path, python: Path) -> EngineParity:
    return vllm_parity(folder, IDS, stock_logits(folder), python=python)


def require_equal(parity: EngineParity) -> None:
    assert parity.max_delta <= 1e-4, parity
    assert parity.top1 == 1.0
    assert parity.mean_kl <= 1e-6
    assert parity.candidates == 300


@pytest.mark.engines
@pytest.mark.parametrize(("case", "target"), PAIRS)
def test_every_family_in_every_target(case: str, target: str, vllm_python: Path, tmp_path: Path) -> None:
    dense = for_vllm(case, tmp_path / "dense")
    fields = {} if target in ("glm4_moe", "qwen2_moe") else {"gate": "softmax_topk"}
    out = write(dense, plans_for(dense, "S2A2E6", **fields), tmp_path / "out", target)
    if otherwise_in_vllm(Checkpoint(out)):
        # Refused by `verify --parity`; it must be wrong, or the refusal is.
        try:
            parity = compared(out, vllm_python)
        except VerificationError:
            return
        assert not parity.max_delta <= 1e-2, parity
    else:
        require_equal(compared(out, vllm_python))


@pytest.mark.engines
def test_windows_do_not_share_a_context(vllm_python: Path, tmp_path: Path) -> None:
    dense = for_vllm("llama", tmp_path / "dense")
    out = write(dense, plans_for(dense), tmp_path / "out", "glm4_moe")
    ids_NW = torch.randint(4, 290, (3, WINDOW), generator=torch.Generator().manual_seed(0))
    ids_NW[2] = ids_NW[0]
    ids_NW[1, :20] = ids_NW[0, :20]  # the second goes on as the first begins
    found = vllm_differences(out, ids_NW, stock_logits(out), python=vllm_python)
    delta_NW = found.delta_T.view(ids_NW.shape)
    assert delta_NW.max() <= 1e-4
    assert torch.equal(delta_NW[2], delta_NW[0])


@pytest.mark.engines
@pytest.mark.parametrize("exact_weights", [False, True])
def test_glm4_moe_with_unequal_layers_and_a_router_bias(exact_weights: bool, vllm_python: Path, tmp_path: Path) -> None:
    dense = build_tiny("qwen2", tmp_path / "dense", num_hidden_layers=4, hidden_size=128, d_ff=160)
    layouts = ["S1A3E6", "S2A1E9", "S1A2E6"]
    plans = {
        f"model.layers.{layer}.mlp": plan_of(160, 128, layout, seed=layer)
        for layer, layout in enumerate(layouts, start=1)
    }
    bias = Router("linear", {**plans["model.layers.3.mlp"].router.tensors, "bias": torch.tensor([1.0, -0.5, 0, 2, -2])})
    plans["model.layers.3.mlp"] = replace(plans["model.layers.3.mlp"], router=bias)
    out = write(dense, plans, tmp_path / "out", "glm4_moe", TargetOptions(exact_weights=exact_weights))
    require_equal(compared(out, vllm_python))


@pytest.mark.engines
@pytest.mark.real
def test_smollm2_with_exact_weights_on_real_text(smollm2: Path, vllm_python: Path, tmp_path: Path) -> None:
    plans = plans_for(smollm2, "S3A3E8")
    out = write(smollm2, plans, tmp_path / "out", "glm4_moe")
    ids_NW = parity_ids(smollm2, 49152, 128, 4)
    parity = vllm_parity(out, ids_NW, stock_logits(out), python=vllm_python)
    assert parity.tokens == 512
    parity.require_exact(out.name)
    assert parity.median <= 1e-4
    assert parity.top1 >= 0.998
