"""GGUF files: llama.cpp computes what transformers computes from the folder, and what it cannot compute is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from moesaic.blueprint.layer import LayerPlan
from moesaic.errors import CheckpointError, InputError, UnsupportedModelError, VerificationError
from moesaic.evaluate.llama_cpp import LlamaCpp, available, llama_cpp_parity, stock_logits
from moesaic.evaluate.native_parity import parity_ids
from moesaic.gguf import tensors as gguf_tensors
from moesaic.gguf.architectures import ARCHITECTURES, check_graph
from moesaic.jobs.export_gguf import export_gguf
from moesaic.progress import Silent
from moesaic.targets.base import TargetOptions
from tests.targets.helpers import IDS, plan_of, plans_for, write, write_gguf
from tests.tiny_models import build_tiny

Tiny = Callable[[str], Path]
needs_llama_cpp = pytest.mark.skipif(not available(), reason="xllamacpp is not installed")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
NO_BIAS = {"attention_bias": False}
PLAIN, PAIRED = TargetOptions(exact_weights=False), TargetOptions(exact_weights=True)
# (family, target or "" for the dense model itself, config)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "glm4_moe", {}),
    ("llama", "glm4_moe", {"rope_parameters": LINEAR}),
    ("qwen2", "glm4_moe", {}),
    ("qwen3", "glm4_moe", NO_BIAS),
    ("mistral", "glm4_moe", {}),
    ("phi3", "glm4_moe", {"rope_parameters": PARTIAL}),
    ("llama", "granitemoeshared", {}),
    ("llama", "granitemoeshared", {"rope_parameters": LLAMA3}),
    ("llama", "granitemoeshared", {"attention_bias": True}),
    ("qwen2", "granitemoeshared", {}),
    ("llama", "mixtral", {}),
    ("llama", "mixtral", {"rope_parameters": LLAMA3}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen3", "qwen3_moe", NO_BIAS),
    ("llama", "", {}),
    ("llama", "", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    ("mistral", "", {}),
    ("qwen2", "", {}),
    ("qwen3", "", NO_BIAS),
]


@pytest.fixture
def stock(tmp_path: Path) -> Callable[..., Path]:
    """``stock("llama", "glm4_moe")``: a split tiny model as a stock folder; the dense one for target ``""``."""

    def make(family: str, target: str, options: TargetOptions = PLAIN, **config: Any) -> Path:
        dense = build_tiny(family, tmp_path / "dense", **config)
        return write(dense, plans_for(dense), tmp_path / target, target, options) if target else dense

    return make


def parity(file: Path, folder: Path, *, reuse: bool = True) -> Any:
    return llama_cpp_parity(file, IDS, stock_logits(folder), candidates=300, reuse=reuse)


def values(file: Path) -> dict[str, Any]:
    return {key: entry.contents() for key, entry in gguf.GGUFReader(file).fields.items()}


def stored(file: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


@needs_llama_cpp
@pytest.mark.parametrize(("family", "target", "config"), CASES)
def test_llama_cpp_computes_what_transformers_does(
    family: str, target: str, config: dict[str, Any], stock: Any, tmp_path: Path
) -> None:
    folder = stock(family, target, **config)
    written = write_gguf(folder, tmp_path / "model.gguf", "f32")
    found = parity(written.output, folder, reuse=len(family) % 2 == 0)
    assert found.tokens == IDS.numel()
    assert found.top1 == 1.0
    assert found.max_delta < 5e-5


@needs_llama_cpp
def test_pairs_of_expert_and_twin_work_in_llama_cpp(stock: Any, tmp_path: Path) -> None:
    folder = stock("llama", "glm4_moe", PAIRED)
    written = write_gguf(folder, tmp_path / "model.gguf", "f32")
    assert values(written.output)["glm4moe.expert_group_used_count"] == 2
    assert parity(written.output, folder).max_delta < 5e-5


@needs_llama_cpp
@pytest.mark.parametrize("layout", ["S4A4E8", "S7A1E8", "S5A2E7"])
def test_layouts_at_the_edge_work_in_llama_cpp(layout: str, tiny: Tiny, tmp_path: Path) -> None:
    plans = plans_for(tiny("llama"), layout)
    folder = write(tiny("llama"), plans, tmp_path / "moe", "glm4_moe", PAIRED)
    written = write_gguf(folder, tmp_path / "model.gguf", "f32")
    assert parity(written.output, folder).max_delta < 5e-5


@needs_llama_cpp
def test_groups_that_are_all_chosen_are_left_out_as_llama_cpp_aborts_on_them(stock: Any, tmp_path: Path) -> None:
    folder = stock("llama", "glm4_moe", PAIRED)
    config = json.loads((folder / "config.json").read_text())
    config |= {"topk_group": config["n_group"], "num_experts_per_tok": config["n_group"]}
    (folder / "config.json").write_text(json.dumps(config))
    written = write_gguf(folder, tmp_path / "model.gguf", "f32")
    assert "glm4moe.expert_group_count" not in values(written.output)
    assert parity(written.output, folder).max_delta < 5e-5


@needs_llama_cpp
@pytest.mark.parametrize("options", [PLAIN, PAIRED], ids=["plain", "paired"])
@pytest.mark.parametrize("case", ["leading dense layer", "layers of different top-k"])
def test_unequal_layers_work_in_llama_cpp(case: str, options: TargetOptions, tiny: Tiny, tmp_path: Path) -> None:
    plans = plans_for(tiny("llama"))
    first, last = plans
    if case == "leading dense layer":
        del plans[first]
    else:
        plans[last] = plan_of(37, 32, "S1A1E4")
    folder = write(tiny("llama"), plans, tmp_path / "moe", "glm4_moe", options)
    written = write_gguf(folder, tmp_path / "model.gguf", "f32")
    assert parity(written.output, folder).max_delta < 5e-5


@needs_llama_cpp
def test_the_comparison_finds_rows_in_the_wrong_order(
    stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stock("llama", "granitemoeshared")
    monkeypatch.setattr(gguf_tensors, "_rope_order", lambda *args: lambda tensor: tensor)
    written = write_gguf(folder, tmp_path / "model.gguf", "f32")
    with pytest.raises(VerificationError, match=r"in llama\.cpp .* differs"):
        parity(written.output, folder).require_exact("model.gguf")


@needs_llama_cpp
@pytest.mark.parametrize(("dtype", "bound"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2)])
def test_smaller_types_run_in_llama_cpp(dtype: str, bound: float, stock: Any, tmp_path: Path) -> None:
    folder = stock("qwen2", "glm4_moe")
    written = write_gguf(folder, tmp_path / "model.gguf", dtype)
    assert parity(written.output, folder).mean_kl < bound


@needs_llama_cpp
def test_a_file_that_llama_cpp_refuses_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").write_bytes(b"GGUF")
    with pytest.raises(VerificationError, match="does not load"):
        LlamaCpp(tmp_path / "empty.gguf")


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_values_survive_in_every_type(dtype: str, stock: Any, tmp_path: Path) -> None:
    folder = stock("llama", "glm4_moe")
    written = write_gguf(folder, tmp_path / "model.gguf", dtype)
    source = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = stored(written.output)
    exact = {"f32": 0.0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 1e-2}[dtype]
    pairs = {
        "token_embd.weight": source["model.embed_tokens.weight"],
        "blk.1.ffn_gate_exps.weight": torch.stack(
            [source[f"model.layers.1.mlp.experts.{index}.gate_proj.weight"] for index in range(4)]
        ),
    }
    for name, expected in pairs.items():
        kind = found[name].tensor_type
        assert kind.name == dtype.upper()
        actual = gguf.quants.dequantize(found[name].data, kind).reshape(expected.shape)
        assert np.abs(actual - expected.float().numpy()).max() <= exact * expected.abs().max().item()
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight", "blk.0.exp_probs_b.bias"):
        assert found[name].tensor_type.name == "F32"


def test_rows_that_do_not_fill_a_block_are_f16_in_a_q8_0_file(stock: Any, tmp_path: Path) -> None:
    written = write_gguf(stock("llama", "glm4_moe"), tmp_path / "model.gguf", "q8_0")
    found = stored(written.output)
    assert written.fallbacks == tuple(name for name, tensor in found.items() if tensor.tensor_type.name == "F16")
    assert "blk.0.ffn_down_exps.weight" in written.fallbacks  # rows of 8
    assert "blk.0.ffn_up_exps.weight" not in written.fallbacks  # rows of 32


def test_metadata_of_glm4_moe(tiny: Tiny, tmp_path: Path) -> None:
    folder = write(tiny("qwen2"), plans_for(tiny("qwen2")), tmp_path / "moe", "glm4_moe", PLAIN)
    found = values(write_gguf(folder, tmp_path / "small-moe.gguf", "bf16").output)
    expected = {
        "general.architecture": "glm4moe",
        "general.name": "small-moe",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_BF16),
        "glm4moe.expert_count": 4,
        "glm4moe.expert_used_count": 2,
        "glm4moe.expert_gating_func": int(gguf.ExpertGatingFuncType.SIGMOID),
        "glm4moe.expert_weights_norm": True,
        "glm4moe.expert_weights_scale": 2.0,
        "glm4moe.leading_dense_block_count": 0,
        "glm4moe.attention.head_count_kv": 2,
        "glm4moe.rope.dimension_count": 8,
        "glm4moe.vocab_size": 300,
    }
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("family", "target", "config", "reason"),
    [
        ("llama", "glm4_moe", {"rope_parameters": LLAMA3}, "llama3 RoPE"),
        ("qwen2", "", {"rope_parameters": LLAMA3}, "llama3 RoPE"),
        ("llama", "", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic RoPE"),
        ("mistral", "mixtral", {"sliding_window": 16}, "sliding window of 16"),
        ("mistral", "", {"sliding_window": 16}, "sliding window of 16"),
        ("qwen3", "", {"attention_bias": True}, "no such bias in qwen3"),
        ("llama", "moesaic", {}, "does not know the moesaic"),
        ("qwen2", "ernie4_5_moe", {}, "correction bias"),
        ("gemma2", "", {}, "gemma2 folders"),
        ("gpt2", "", {}, "gpt2 folders"),
    ],
)
def test_what_llama_cpp_would_compute_wrongly_is_refused(
    family: str, target: str, config: dict[str, Any], reason: str, stock: Any, tmp_path: Path
) -> None:
    folder = stock(family, target, **config)
    with pytest.raises(UnsupportedModelError, match=reason):
        write_gguf(folder, tmp_path / "gguf" / "model.gguf")
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize(("active", "groups", "fits"), [(22, 1, True), (32, 1, False), (16, 1, True), (28, 44, False)])
def test_more_active_experts_than_llama_cpp_has_room_for_are_refused(active: int, groups: int, fits: bool) -> None:
    config = CONFIG_MAPPING["glm4_moe"](
        num_hidden_layers=24, num_experts_per_tok=active, n_routed_experts=44, n_group=groups, n_shared_experts=1
    )
    refusal = nullcontext() if fits else pytest.raises(UnsupportedModelError, match=f"{active} active experts")
    with refusal:
        check_graph(ARCHITECTURES["glm4_moe"], config, 339)


def test_qwen2_moe_with_normalised_weights_or_dense_layers_is_refused(stock: Any, tmp_path: Path) -> None:
    folder = stock("qwen2", "qwen2_moe")
    config = folder / "config.json"
    text = config.read_text()
    for old, new, reason in [
        ('"norm_topk_prob": false', '"norm_topk_prob": true', "norm_topk_prob is true"),
        ('"mlp_only_layers": []', '"mlp_only_layers": [1]', "dense layers among"),
    ]:
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises(UnsupportedModelError, match=reason):
            write_gguf(folder, tmp_path / "model.gguf")


def _change(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file(tensors | {name: change(tensors[name])}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("model.layers.1.mlp.shared_expert_gate.weight", 0.0, "NaN from a shared gate of 0"),
        ("model.layers.1.mlp.experts.2.up_proj.weight", float("nan"), "NaN or infinite"),
        ("model.layers.1.mlp.experts.2.up_proj.weight", 1e5, "beyond the range of f16"),
    ],
)
def test_bad_values_leave_no_file(name: str, value: float, reason: str, stock: Any, tmp_path: Path) -> None:
    folder = stock("qwen2", "qwen2_moe")
    _change(folder, name, lambda tensor: torch.full_like(tensor, value))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=reason):
        write_gguf(folder, tmp_path / "out" / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tensor_without_a_place_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path / "dense")
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.mlp.extra.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"extra\.weight has no place"):
        write_gguf(folder, tmp_path / "model.gguf")


def test_a_head_or_embeddings_that_are_missing_are_named(tmp_path: Path) -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        folder = build_tiny("llama", tmp_path / name, dtype="bfloat16", tie_word_embeddings=False)
        file = folder / "model.safetensors"
        kept = {key: tensor for key, tensor in load_file(file).items() if key != name}
        save_file(kept, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"no tensor {name}"):
            export_gguf(folder, tmp_path / "model.gguf")


def test_a_file_name_does_not_switch_on_what_llama_cpp_does_to_some_models(tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path / "dense", dtype="bfloat16")
    names = [values(write_gguf(folder, tmp_path / f"{stem}.gguf").output)["general.name"] for stem in ("Phi-3x", "ok")]
    assert names == ["Phi_3x", "ok"]


def test_arguments_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.gguf").write_text("precious")
    for out, dtype, reason in [
        ("old.gguf", "f16", "exists already"),
        ("new.gguf", "q4_k", "unknown GGUF type"),
        ("new.bin", "f16", r"does not end in \.gguf"),
    ]:
        with pytest.raises(InputError, match=reason):
            write_gguf(tmp_path / "missing", tmp_path / out, dtype)
    assert (tmp_path / "old.gguf").read_text() == "precious"


class Nested(Silent):
    """Starts the same export again in the middle of the first."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out, self.refused = folder, out, ""

    def advance(self, detail: str = "") -> None:
        if not self.refused:
            with pytest.raises(InputError) as refusal:
                write_gguf(self.folder, self.out, "f32")
            self.refused = refusal.value.message


def test_two_exports_to_one_file_do_not_mix(tiny: Tiny, tmp_path: Path) -> None:
    alone = write_gguf(tiny("qwen2"), tmp_path / "alone" / "model.gguf", "f32").output
    together = tmp_path / "together" / "model.gguf"
    nested = Nested(tiny("qwen2"), together)
    write_gguf(tiny("qwen2"), together, "f32", progress=nested)
    assert "another process is writing" in nested.refused
    assert together.read_bytes() == alone.read_bytes()
    assert list(together.parent.iterdir()) == [together]


def test_what_a_killed_export_left_is_cleared_and_what_is_not_ours_is_not(tiny: Tiny, tmp_path: Path) -> None:
    left = tmp_path / "model.gguf.partial"
    left.mkdir()
    for name in ("lock", "model.gguf", "model.gguf.tmp"):
        (left / name).write_text("half")
    assert write_gguf(tiny("llama"), tmp_path / "model.gguf").output.stat().st_size > 1000
    assert not left.exists()
    other = tmp_path / "other.gguf.partial"
    other.mkdir()
    (other / "diary").write_text("precious")
    with pytest.raises(InputError, match="in the way"):
        write_gguf(tiny("llama"), tmp_path / "other.gguf")
    assert (other / "diary").read_text() == "precious"


def test_equal_folders_give_equal_bytes(tiny: Tiny, tmp_path: Path) -> None:
    plans: dict[str, LayerPlan] = plans_for(tiny("llama"))
    folder = write(tiny("llama"), plans, tmp_path / "moe", "granitemoeshared")
    (tmp_path / "again").mkdir()
    files = [write_gguf(folder, tmp_path / where / "model.gguf", "q8_0").output for where in (".", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@needs_llama_cpp
@pytest.mark.real
@pytest.mark.parametrize("target", ["", "glm4_moe"])
def test_smollm2_on_real_text_in_llama_cpp(target: str, smollm2: Path, tmp_path: Path) -> None:
    folder, ids_NW = smollm2, parity_ids(smollm2, 49152, 48)
    if target:
        folder = write(smollm2, plans_for(smollm2, "S3A3E8"), tmp_path / target, target, PAIRED)
    written = write_gguf(folder, tmp_path / "model.gguf", "f32")
    found = llama_cpp_parity(written.output, ids_NW, stock_logits(folder), candidates=200)
    assert found.top1 == 1.0
    assert found.max_delta < 1e-3
