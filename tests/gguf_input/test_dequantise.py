"""The dequantised folder: its values and dtype, its tokenizer, and what of it is there when a run ends early."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from filelock import FileLock
from transformers import AutoTokenizer

from moesaic.checkpoint import dequantise as module
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.source import resolve_model
from moesaic.errors import CheckpointError, ResourceError, UnsupportedModelError
from moesaic.jobs.plan import plan
from tests.gguf_input import files
from tests.gguf_input.files import BF16, F16, F32, KV, Q8_0, WIDTH, D, write_tiny_gguf
from tests.tiny_models import VOCAB

_TEXTS = ["The router reads 1234 words.", " the experts", "a  b\n\n c", "12 3"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _values(file: Path, name: str) -> torch.Tensor:
    """What the package gguf reads, in float32."""
    tensor = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == name)
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))


@pytest.mark.parametrize(
    ("stored", "precise", "dtype"),
    [
        (BF16, BF16, "bfloat16"),
        (F16, F16, "float16"),
        (F32, F32, "float32"),
        (Q8_0, F32, "float32"),
        (BF16, F32, "float32"),  # norms that 16 bits do not hold
    ],
)
def test_every_value_is_that_of_the_file(
    stored: gguf.GGMLQuantizationType, precise: gguf.GGMLQuantizationType, dtype: str, tmp_path: Path
) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", stored=stored, precise=precise)
    checkpoint = Checkpoint(resolve_model(str(file)))
    assert {checkpoint.info(name).dtype for name in checkpoint.names} == {dtype}
    assert checkpoint.config["dtype"] == dtype
    for name, source in {
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
        "model.embed_tokens.weight": "token_embd.weight",
    }.items():
        assert torch.equal(checkpoint.tensor(name).float(), _values(file, source))
    keys = checkpoint.tensor("model.layers.0.self_attn.k_proj.weight").float()
    pairs = _values(file, "blk.0.attn_k.weight").reshape(KV, WIDTH // 2, 2, D)
    assert torch.equal(keys.reshape(KV, 2, WIDTH // 2, D), pairs.transpose(1, 2))


def test_norms_in_float32_that_came_from_16_bits_leave_the_folder_at_16_bits(tmp_path: Path) -> None:
    norms = {f"blk.{layer}.{name}.weight": np.full(D, 1.5, np.float32) for layer in range(3) for name in _NORMS}
    norms["output_norm.weight"] = np.full(D, 0.25, np.float32)
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", stored=BF16, tensors=norms)
    assert Checkpoint(resolve_model(str(file))).dtype == "bfloat16"


_NORMS = ("attn_norm", "ffn_norm")


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
@pytest.mark.parametrize("stored", [BF16, Q8_0])
def test_plan_of_a_gguf_is_that_of_its_folder(name: str, stored: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", name, stored=stored)
    options: dict[str, Any] = {"method": "mlpmoe", "hierarchical": name == "mixtral"}
    told = plan(file, options).to_dict()
    folder = resolve_model(str(file))
    found = plan(folder, options).to_dict()
    remark = told["remarks"].pop()
    assert remark.startswith("the GGUF is dequantised first")
    sizes = {"output_bytes", "staging_bytes", "mapped_bytes", "remarks"}  # with tokenizer.json, which is not there yet
    assert {key: value for key, value in told.items() if key not in sizes} == {
        key: value for key, value in found.items() if key not in sizes
    }
    beside = (folder / "tokenizer.json").stat().st_size
    headers = 2**14
    assert abs(told["mapped_bytes"] - found["mapped_bytes"]) < headers
    assert abs(told["output_bytes"] - found["output_bytes"]) < headers + beside


def test_a_folder_with_nothing_but_a_gguf_names_it(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "Tiny.GGUF", "llama")
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"GGUF")
    for ask in (lambda: plan(tmp_path), lambda: Checkpoint(resolve_model(str(tmp_path)))):
        with pytest.raises(CheckpointError, match=r"has no config\.json") as caught:
            ask()
        assert caught.value.hint.endswith(str(file))


def test_a_relative_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOESAIC_CACHE", "near")
    folder = resolve_model(str(file))
    assert folder.is_absolute()
    assert folder.parent == tmp_path / "near"


def test_one_process_at_a_time_and_leftovers_are_cleared(tmp_path: Path, cache: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    left = cache / ".dequantise-other-0123456789ab"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    found: list[Path] = []
    with FileLock(cache / ".lock"):  # as another process that is at work
        waiting = threading.Thread(target=lambda: found.append(resolve_model(str(file))))
        waiting.start()
        time.sleep(0.5)
        assert left.is_dir()
        assert not found
    waiting.join(60)
    assert {path.name for path in cache.iterdir()} == {".lock", found[0].name}


def test_sigterm_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    read = module.read_tokenizer
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a command line that ran here may have set its own

    def terminated(header: Any) -> Any:
        assert list(cache.glob(".dequantise-*"))
        os.kill(os.getpid(), signal.SIGTERM)
        return read(header)

    monkeypatch.setattr(module, "read_tokenizer", terminated)
    with pytest.raises(SystemExit) as ended:
        resolve_model(str(file))
    assert ended.value.code == 128 + signal.SIGTERM
    assert [path.name for path in cache.iterdir()] == [".lock"]
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_DFL


def test_no_room(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ResourceError, match="GB more"):
        resolve_model(str(file))
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 60_000)
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    folder = resolve_model(str(file))
    checkpoint = Checkpoint(folder)
    assert len(checkpoint.files) > 3
    assert torch.equal(checkpoint.tensor("lm_head.weight"), _values(file, "output.weight"))


def test_shapes_that_do_not_fit_are_refused_by_name(tmp_path: Path, cache: Path) -> None:
    wide = {"blk.1.ffn_up.weight": np.ones((100, D), np.float32)}
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", tensors=wide)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        resolve_model(str(file))
    assert [path.name for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_texts_are_split_as_in_llama_cpp(pre: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="the extra moesaic[llama-cpp] is not installed")
    from moesaic.evaluate.llama_cpp import LlamaCpp

    _write_pre(monkeypatch, pre)
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(str(file)))
    with LlamaCpp(file) as engine:
        assert [tokenizer(text).input_ids for text in _TEXTS] == [engine.tokenize(text) for text in _TEXTS]


@pytest.mark.parametrize("prefix", [True, False])
def test_a_space_before_the_text_is_added_where_llama_cpp_adds_it(
    prefix: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp", reason="the extra moesaic[llama-cpp] is not installed")
    from moesaic.evaluate.llama_cpp import LlamaCpp

    monkeypatch.setattr(files, "_add_tokenizer", lambda writer: _add_sentencepiece(writer, prefix))
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(str(file)))
    texts = ["the one", "on the", "he\nin", "é"]
    with LlamaCpp(file) as engine:
        assert [tokenizer(text).input_ids for text in texts] == [engine.tokenize(text, special=True) for text in texts]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def _add_sentencepiece(writer: gguf.GGUFWriter, prefix: bool) -> None:
    words = ["▁", "t", "h", "e", "th", "the", "▁th", "▁the", "o", "n", "i", "on", "▁on", "in"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    scores = [0.0] * 259 + [float(len(word)) - 10 for word in words]
    unused = VOCAB - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"[PAD{index}]" for index in range(unused))])
    writer.add_token_types([*types, *[5] * unused])
    writer.add_token_scores([*scores, *[-1e4] * unused])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(prefix)


def test_a_split_that_transformers_does_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_pre(monkeypatch, "viking")
    with pytest.raises(UnsupportedModelError, match=r"splits text as 'viking' \(tokenizer\.ggml\.pre\)"):
        resolve_model(str(write_tiny_gguf(tmp_path / "tiny.gguf", "llama")))


def _write_pre(monkeypatch: pytest.MonkeyPatch, pre: str) -> None:
    """Let files name this split, and have a merge that only a split without digits of their own would use."""
    write = files._add_tokenizer

    def named(writer: gguf.GGUFWriter) -> None:
        write(writer)
        fields = writer.kv_data[0]
        fields["tokenizer.ggml.pre"].value = pre
        tokens, merges = fields["tokenizer.ggml.tokens"].value, fields["tokenizer.ggml.merges"].value
        tokens[-2:] = ["12", "Ġ1"]
        merges[:] = [merge for merge in merges if merge.replace(" ", "") in tokens] + ["1 2", "Ġ 1"]

    monkeypatch.setattr(files, "_add_tokenizer", named)
