"""GGUF files whose matrices llama.cpp's own quantiser packs: types, values, and what llama.cpp computes from them."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, VerificationError
from moesaic.evaluate.llama_cpp import LlamaCpp, available, llama_cpp_parity, stock_logits
from moesaic.evaluate.llama_cpp_perplexity import llama_cpp_perplexity
from moesaic.evaluate.perplexity import perplexity
from moesaic.evaluate.stock import Stock
from moesaic.gguf import DTYPES, PACKED_BY_LLAMA_CPP
from moesaic.gguf import file as file_of_gguf
from moesaic.gguf.architectures import architecture_of, common_values, read_config
from moesaic.gguf.file import GGUFTensor
from moesaic.gguf.mixtures import MIXTURES, model_of, storage
from moesaic.gguf.tensors import gguf_tensors
from moesaic.jobs.export_gguf import export_gguf
from moesaic.jobs.quantise import Quantiser
from moesaic.progress import Silent
from moesaic.targets.base import TargetOptions
from tests.targets.helpers import IDS, plans_for, write, write_gguf
from tests.tiny_models import build_tiny

Type = gguf.GGMLQuantizationType
needs_llama_cpp = pytest.mark.skipif(not available(), reason="xllamacpp is not installed")
# 256 wide, so that rows fill the blocks of K-quants; six units of 256 neurons.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1536, "dtype": "bfloat16"}
ALIGNED = TargetOptions(align=256)
RECORDED = Path(__file__).parents[1] / "data" / "llama_quantize_types.json"


class Notes(Silent):
    """Keeps what a job remarks."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def note(self, text: str) -> None:
        self.kept.append(text)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in glm4_moe with top-2 experts, each beside its twin."""
    folder = tmp_path_factory.mktemp("twins")
    dense = build_tiny("llama", folder / "dense", **WIDE)
    return write(dense, plans_for(dense), folder / "moe", "glm4_moe", ALIGNED)


def kinds(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def test_every_type_is_described() -> None:
    assert tuple(MIXTURES) == DTYPES


# As they were shown to llama.cpp: width, d_ff, key/value heads of 4, layout, options.
SHOWN: dict[str, tuple[int, int, int, str, TargetOptions]] = {
    "dense tied": (256, 1536, 1, "", ALIGNED),
    "moe4": (256, 1536, 1, "S2A2E6", TargetOptions(align=256, exact_weights=False)),
    "moe8": (256, 1536, 1, "S2A2E6", ALIGNED),
    "narrow": (96, 600, 2, "S2A2E6", TargetOptions(align=32)),
    "odd": (96, 48, 4, "S2A2E6", TargetOptions(align=8)),
}


@pytest.mark.parametrize("model", SHOWN)
def test_types_are_those_of_llama_quantize(model: str, tmp_path: Path) -> None:
    """tests/data/llama_quantize_types.json is what llama_model_quantize of llama.cpp b11739 chose for these models."""
    width, d_ff, kv_heads, layout, options = SHOWN[model]
    layers = {
        "num_hidden_layers": 17,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": width // 4,
    }
    dense = build_tiny(
        "llama", tmp_path / "dense", hidden_size=width, intermediate_size=d_ff, tie_word_embeddings=not layout, **layers
    )
    folder = write(dense, plans_for(dense, layout), tmp_path / "moe", "glm4_moe", options) if layout else dense
    checkpoint = Checkpoint(folder)
    architecture, config = architecture_of(checkpoint.config), read_config(checkpoint.config)
    tensors = gguf_tensors(checkpoint, architecture, config)
    rows = [row for row in json.loads(RECORDED.read_text(encoding="utf-8")) if row["model"] == model]
    assert [row["type"] for row in rows] == list(DTYPES[3:])
    for row in rows:
        chosen = storage(tensors, row["type"], model_of(config, common_values(architecture, config), tensors))
        assert _by_part({name: one.type.name for name, one in chosen.items()}) == row["parts"]


def _by_part(types: dict[str, str]) -> dict[str, str]:
    """Part -> its types over the layers, such as ``2xQ6_K 3xQ4_K``; parts that are always F32 left out."""
    parts: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        block = name.split(".")
        part, layer = (block[2], int(block[1])) if block[0] == "blk" else (block[0], 0)
        parts.setdefault(part, {})[layer] = kind
    return {
        part: " ".join(f"{len(list(run))}x{kind}" for kind, run in groupby(found[layer] for layer in sorted(found)))
        for part, found in sorted(parts.items())
        if set(found.values()) != {"F32"}
    }


@needs_llama_cpp
@pytest.mark.parametrize("dtype", PACKED_BY_LLAMA_CPP)
def test_packed_files_load_and_compute_the_model(dtype: str, twins: Path, tmp_path: Path) -> None:
    written = export_gguf(twins, tmp_path / "model.gguf", dtype.upper())
    assert written.parity is not None
    assert written.parity.bound is not None
    assert written.parity.median <= written.parity.bound
    assert written.perplexity is not None
    before, after = written.perplexity
    assert after.predicted == before.predicted > 100
    found = kinds(written.output)
    assert found["blk.0.ffn_up_exps.weight"] == MIXTURES[dtype][0].name
    assert written.fallbacks == ()
    assert "F16" not in found.values()


@needs_llama_cpp
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_packed_as_they_are_alone(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.jobs.quantise._AT_ONCE", 5 * 512)
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    values = np.random.default_rng(0).normal(size=(3, 4, 512)).astype(np.float32)
    with Quantiser() as quantiser:
        together = quantiser.pack(values, Type.Q4_K)
        alone = [quantiser.pack(row[None], Type.Q4_K)[0] for row in values.reshape(-1, 512)]
    assert np.array_equal(together.reshape(12, -1), np.stack(alone))
    error = np.linalg.norm(dequantize(together, Type.Q4_K) - values) / np.linalg.norm(values)
    assert 0.05 < error < 0.1


@needs_llama_cpp
def test_a_quantiser_that_ends_is_one_clear_error() -> None:
    with Quantiser() as quantiser, pytest.raises(VerificationError, match=r"llama\.cpp's quantiser"):
        quantiser.pack(np.zeros((1, 256), np.float32), Type.IQ1_S)  # wants an importance matrix


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["q4_0", "q4_k_m", "q2_k"])
def test_reading_back_finds_rows_of_another_matrix(
    dtype: str, twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = file_of_gguf._encode

    def planted(tensor: GGUFTensor, stored: Any, pack: Any) -> Any:
        packed = encode(tensor, stored, pack)
        return np.roll(packed, 1, 0) if tensor.name == "blk.1.ffn_down_exps.weight" else packed

    monkeypatch.setattr(file_of_gguf, "_encode", planted)
    with pytest.raises(VerificationError, match=r"blk\.1\.ffn_down_exps\.weight differs in .* rows from the folder's"):
        export_gguf(twins, tmp_path / "out" / "model.gguf", dtype)
    assert list((tmp_path / "out").iterdir()) == []


@needs_llama_cpp
def test_rows_of_other_lengths_fall_back_as_in_llama_cpp_and_the_remedy_is_said(tmp_path: Path) -> None:
    dense = build_tiny("llama", tmp_path / "dense", **(WIDE | {"intermediate_size": 6 * 96}))
    folder = write(dense, plans_for(dense), tmp_path / "moe", "glm4_moe", TargetOptions(align=32))
    notes = Notes()
    written = export_gguf(folder, tmp_path / "model.gguf", "q4_k_m", check=False, progress=notes)
    found = kinds(written.output)
    assert {found[f"blk.{layer}.ffn_down_exps.weight"] for layer in (0, 1)} <= {"Q5_0", "Q8_0"}
    assert found["blk.0.ffn_up_exps.weight"] == "Q4_K"
    assert set(written.fallbacks) == {name for name in found if "ffn_down" in name}
    assert any("--align 256" in text and "no multiple of 256" in text for text in notes.kept)


@needs_llama_cpp
def test_twins_work_with_rows_that_llama_cpp_rearranges(twins: Path, tmp_path: Path) -> None:
    """Weights that q4_0 holds exactly, so that only the inputs of products are rounded."""
    folder = _rounded(twins, tmp_path / "rounded")
    file = write_gguf(folder, tmp_path / "model.gguf", "q4_0").output
    assert kinds(file)["blk.0.ffn_down_exps.weight"] == "Q4_0"
    found = llama_cpp_parity(file, IDS, stock_logits(folder), candidates=300, reuse=True)
    batched = llama_cpp_parity(file, IDS, stock_logits(folder), candidates=300, reuse=False)
    assert max(found.mean_kl, batched.mean_kl) < 0.02
    other = llama_cpp_parity(write_gguf(twins, tmp_path / "other.gguf", "q4_0").output, IDS, stock_logits(twins))
    assert other.mean_kl > 5 * found.mean_kl  # of rounded weights


def _rounded(folder: Path, out: Path) -> Path:
    """A copy whose matrices, but for routers and the output, are what q4_0 makes of them."""
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    with Quantiser() as quantiser:
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if tensor.dim() == 2 and not name.endswith(("mlp.gate.weight", "lm_head.weight")):
                    packed = quantiser.pack(tensor.float().numpy(), Type.Q4_0)
                    tensors[name] = torch.from_numpy(dequantize(packed, Type.Q4_0))
            save_file(tensors, out / file.name, metadata={"format": "pt"})
    return out


@needs_llama_cpp
def test_perplexity_in_llama_cpp_is_that_of_transformers(tmp_path: Path) -> None:
    folder = build_tiny("qwen2", tmp_path / "dense")
    file = write_gguf(folder, tmp_path / "model.gguf", "f32").output
    ids_NW = torch.randint(4, 290, (3, 40), generator=torch.Generator().manual_seed(0))
    found, expected = llama_cpp_perplexity(file, ids_NW, "x"), perplexity(Stock(folder).model, ids_NW, "x")
    assert found.predicted == expected.predicted == 3 * 39
    assert found.window_nll == pytest.approx(expected.window_nll, rel=2e-3)
    assert found.value == pytest.approx(expected.value, rel=2e-3)
    with pytest.raises(InputError, match="windows of 600 tokens"):
        llama_cpp_perplexity(file, torch.zeros(1, 600, dtype=torch.int64), "x")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(VerificationError, match="does not load"):
        llama_cpp_perplexity(tmp_path / "bad.gguf", ids_NW, "x")


@needs_llama_cpp
def test_a_packed_file_speaks(twins: Path, tmp_path: Path) -> None:
    file = write_gguf(twins, tmp_path / "model.gguf", "q4_k_m").output
    with LlamaCpp(file) as engine:
        assert engine.complete(IDS[0].tolist(), 4)["timings"]["predicted_n"] == 4


def test_types_that_llama_cpp_packs_are_refused_without_it(twins: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.evaluate.llama_cpp.available", lambda: False)
        with pytest.raises(InputError, match=r"q4_k_m is packed by llama\.cpp"):
            export_gguf(twins, tmp_path / "model.gguf", "q4_k_m")
