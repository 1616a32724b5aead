"""What a GGUF computes in llama.cpp, its dequantised folder computes in transformers: all architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moesaic.checkpoint.reader import read_json
from moesaic.checkpoint.source import resolve_model
from moesaic.evaluate.llama_cpp import llama_cpp_differences, stock_logits
from moesaic.gguf_input.architectures import ARCHITECTURES as READ
from tests.gguf_input.files import ARCHITECTURES, CONTEXT, QKV, WIDTH, Array, write_tiny_gguf
from tests.tiny_models import VOCAB

pytest.importorskip("xllamacpp", reason="the extra moesaic[llama-cpp] is not installed")

_TOKENS = 24
# Of log-probabilities in fp32. llama.cpp computes GELU from a table in fp16.
_BOUND, _GELU_BOUND = 5e-5, 1.5e-2
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
_LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
_ALL = (*QKV, "attn_output")


def _llama3(factor: float, original: int) -> Array:
    """Divisors of the frequencies, as llama.cpp's converter writes them: from transformers' own formula."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
    config = LlamaConfig(hidden_size=4 * WIDTH, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 10000.0 ** (torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    return (plain / scaled.double()).float().numpy()


def _longrope(original: int) -> dict[str, Any]:
    factors = {"long": np.linspace(1, 9, WIDTH // 2), "short": np.linspace(1, 3, WIDTH // 2)}
    return {
        "keys": {"rope.scaling.attn_factor": 1.19, "rope.scaling.original_context_length": original},
        "tensors": {f"rope_factors_{name}.weight": value.astype(np.float32) for name, value in factors.items()},
    }


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "tied": ("llama", {"untied": False}),
    "wide epsilon": ("llama", {"keys": {"attention.layer_norm_rms_epsilon": 0.1}}),
    "llama3 rope": ("llama", {"tensors": {"rope_freqs.weight": _llama3(8.0, 64)}}),
    "linear rope": ("llama", {"keys": _LINEAR}),
    "linear rope, an old key": ("llama", {"keys": {"rope.scale_linear": 4.0}}),
    "no rope scaling": ("llama", {"keys": {**_LINEAR, "rope.scaling.type": "none"}}),
    "yarn": ("qwen2", {"keys": _YARN}),
    "yarn with a factor": ("qwen3", {"keys": {**_YARN, "rope.scaling.attn_factor": 1.1}}),
    "long rope": ("phi3", _longrope(16)),
    "short rope": ("phi3", _longrope(CONTEXT)),
    "all biases": ("llama", {"biases": (*_ALL, "ffn_gate", "ffn_up", "ffn_down")}),
    "biases of query, key and value": ("llama", {"biases": QKV}),
    "qwen3 biases": ("qwen3", {"biases": QKV}),
    "granite biases": ("granite", {"biases": _ALL}),
    "part of a head rotates": ("phi3", {"keys": {"rope.dimension_count": WIDTH // 2}}),
    "gemma2 27B's query scale": ("gemma2", {"keys": {"block_count": 46, "embedding_length": 64}}),
    "gemma2's own caps": ("gemma2", {"keys": {"attn_logit_softcapping": None, "final_logit_softcapping": None}}),
    "gemma3 linear rope": ("gemma3", {"keys": _LINEAR}),
    "gemma3 local rope": ("gemma3", {"keys": {"rope.freq_base_swa": 500.0, "rope.freq_base": 1e6}}),
    "gemma3 other pattern": ("gemma3", {"keys": {"attention.sliding_window_pattern": 3}}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_folder_computes_what_the_file_computes(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", name, **options)
    folder = resolve_model(str(gguf))
    ids_NW = torch.randint(2, VOCAB, (1, _TOKENS), generator=torch.Generator().manual_seed(1))
    found = llama_cpp_differences(gguf, ids_NW, stock_logits(folder), reuse=False)
    gelu = name.startswith(("gemma", "gpt2"))
    assert found.delta_T.max() < (_GELU_BOUND if gelu else _BOUND)


def test_every_architecture_is_compared() -> None:
    assert {*READ, "mixtral"} == set(ARCHITECTURES)


def test_phi3_keeps_the_window_that_llama_cpp_leaves_out(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", "phi3", keys={"attention.sliding_window": 8})
    folder = resolve_model(str(gguf))
    assert read_json(folder / "config.json")["sliding_window"] == 8
    ids_NW = torch.randint(2, VOCAB, (1, 12), generator=torch.Generator().manual_seed(1))
    found = llama_cpp_differences(gguf, ids_NW, stock_logits(folder), reuse=False)
    assert found.delta_T[:8].max() < _BOUND
    assert found.delta_T[9:].min() > 100 * _BOUND
