"""resolve_model: folders, GGUF files and hub ids; everything else is an error that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.checkpoint.origin import Licence, read_origin
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.source import described_folder, resolve_model
from moesaic.errors import CheckpointError, InputError, MoesaicError, ResourceError, UnsupportedModelError

gguf = pytest.importorskip("gguf", reason="the extra moesaic[gguf] is not installed")
Tiny = Callable[[str], Path]


def write_gguf(folder: Path, file: Path, about: Callable[[gguf.GGUFWriter], None] | None = None) -> Path:
    """A tiny Llama as GGUF: FFN matrices in Q8_0 where the width allows, the rest F32; ``about``: more fields."""
    checkpoint, tokenizer = Checkpoint(folder), AutoTokenizer.from_pretrained(folder)
    config = checkpoint.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    if about is not None:
        about(writer)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name in checkpoint.names:
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        tensor = checkpoint.tensor(name)
        if count := next((heads[key] for key in heads if key in name), None):  # llama.cpp interleaves the rotary halves
            tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        array = tensor.contiguous().float().numpy()
        if "up_proj" in name:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(array, q8), raw_dtype=q8)
        else:
            writer.add_tensor(names.get_name(name, (".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: AutoTokenizer) -> None:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in spec["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)


@pytest.fixture(scope="module")
def tiny_gguf(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny("llama"), tmp_path_factory.mktemp("gguf") / "tiny-q8.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_folder(tiny: Tiny, cache: Path) -> None:
    assert resolve_model(str(tiny("llama"))) == tiny("llama")
    assert not cache.exists()


def test_gguf_becomes_an_ordinary_checkpoint(tiny_gguf: Path, tiny: Tiny) -> None:
    folder = resolve_model(str(tiny_gguf))
    checkpoint, dense = Checkpoint(folder), Checkpoint(tiny("llama"))
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.config["model_type"] == "llama"
    assert {checkpoint.info(name).dtype for name in checkpoint.names} == {"float32"}
    for name in dense.names:
        error = (checkpoint.tensor(name) - dense.tensor(name).float()).abs().max()
        assert 0 < error < 0.01 if "up_proj" in name else error == 0
    ids = AutoTokenizer.from_pretrained(tiny("llama"))("The router reads this.").input_ids
    assert AutoTokenizer.from_pretrained(folder)("The router reads this.").input_ids == ids
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(torch.tensor([ids])).logits
            for f in (folder, tiny("llama"))
        ]
    torch.testing.assert_close(*logits, atol=0.05, rtol=0)


def test_what_a_gguf_says_of_its_origin_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    def about(writer: gguf.GGUFWriter) -> None:
        writer.add_license("apache-2.0")
        writer.add_languages(["en", "de"])
        writer.add_source_repo_url("https://huggingface.co/acme/small-1b")

    folder = resolve_model(str(write_gguf(tiny("llama"), tmp_path / "told.gguf", about)))
    origin = read_origin(folder, Checkpoint(folder).config)
    assert (origin.base_model, origin.languages) == ("acme/small-1b", ("en", "de"))
    assert origin.licence == Licence("apache-2.0")


def test_gguf_is_dequantised_once(tiny_gguf: Path, cache: Path) -> None:
    folder = resolve_model(str(tiny_gguf))
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert resolve_model(str(tiny_gguf)) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == times
    assert {path.name for path in cache.iterdir()} == {".lock", folder.name}


def truncated(source: Path, target: Path, size: int) -> Path:
    target.write_bytes(source.read_bytes()[:size])
    return target


@pytest.mark.parametrize("size", [6, 200, -100])
def test_truncated_gguf(size: int, tiny_gguf: Path, tmp_path: Path, cache: Path) -> None:
    file = truncated(tiny_gguf, tmp_path / "cut.gguf", size)
    with pytest.raises(CheckpointError, match=r"cut\.gguf is damaged or incomplete") as caught:
        resolve_model(str(file))
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "oddity")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="oddity") as caught:
        resolve_model(str(tmp_path / "odd.gguf"))
    assert "original checkpoint" in caught.value.hint


def test_cache_that_cannot_be_written(tiny_gguf: Path, cache: Path) -> None:
    cache.write_text("a file in its place")
    with pytest.raises(ResourceError, match=r"cannot write to .*set MOESAIC_CACHE"):
        resolve_model(str(tiny_gguf))


WRONG: dict[str, tuple[str, bytes | None, type[MoesaicError], str]] = {
    "no GGUF": ("a.gguf", b"PK\x03\x04", CheckpointError, r"a\.gguf is not a GGUF file"),
    "empty": ("a.gguf", b"", CheckpointError, "is not a GGUF file"),
    "no header": ("a.GGUF", b"GGUF", CheckpointError, r"a\.GGUF is damaged or incomplete"),
    "one shard": ("model.safetensors", b"x", InputError, "one file of a checkpoint .give its folder"),
    "config": ("config.json", b"{}", InputError, "one file of a checkpoint .give its folder"),
    "text": ("notes.txt", b"hello", CheckpointError, r"notes\.txt is not a model"),
    "missing gguf": ("gone.gguf", None, InputError, "there is no model at"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file(name: str, tmp_path: Path, cache: Path) -> None:
    file_name, content, error, message = WRONG[name]
    if content is not None:
        (tmp_path / file_name).write_bytes(content)
    with pytest.raises(error, match=message):
        resolve_model(str(tmp_path / file_name))
    assert not cache.exists()


@pytest.mark.parametrize("given", ["smollm2-136m", "SmolLM2-135m", "./smollm-135m", "smollm2-135m.gguf"])
def test_misspelt_path_has_a_suggestion(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"there is no model at .*did you mean smollm2-135m"):
        resolve_model(given)


@pytest.mark.parametrize(
    "given", ["", "./gone", "/gone/away/model", "a/b/c", "no spaces/allowed", "~nobody-here/m", "x" * 5000]
)
def test_what_is_neither_path_nor_hub_id(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        resolve_model(given)


@pytest.mark.parametrize("given", ["gpt2", "some-owner/some-model_1.5"])
def test_hub_id_offline(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for resolve in (resolve_model, described_folder):
        with pytest.raises(InputError, match=f"no folder '{given}', .* HF_HUB_OFFLINE forbids asking") as caught:
            resolve(given)
        assert "unset HF_HUB_OFFLINE, or give a local folder" in caught.value.hint
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(InputError, match="TRANSFORMERS_OFFLINE forbids asking"):
        resolve_model(given)


def test_a_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_given: object, **_options: object) -> None:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(InputError, match="no folder 'gpt2', and the hub cannot be reached"):
        resolve_model("gpt2")


def test_a_hub_model_without_safetensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--owner--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InputError, match="owner/model has no safetensors"):
        resolve_model("owner/model")


def test_an_output_beside_does_not_hide_the_model_of_the_hub_that_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "distilgpt2-moe").mkdir()
    (tmp_path / "owner" / "model_moe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for given in ("distilgpt2", "owner/model"):
        for resolve in (resolve_model, described_folder):
            with pytest.raises(InputError, match="forbids asking the hub"):
                resolve(given)


@pytest.mark.parametrize("given", ["~nobody-here/m", "x" * 5000])
def test_what_cannot_be_a_path_is_one_line_without_weights_too(given: str) -> None:
    with pytest.raises(InputError, match="cannot read") as caught:
        described_folder(given)
    assert caught.value.hint


def test_a_revision_is_taken_as_it_is_named(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "hub" / "models--owner--model"
    for name, commit in (("v1", "1" * 40), ("main", "2" * 40)):
        snapshot = repo / "snapshots" / commit
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.symlink_to(tiny("llama" if name == "v1" else "qwen2"))
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for given, family in (("owner/model@v1", "llama"), ("owner/model", "qwen2"), (f"owner/model@{'1' * 40}", "llama")):
        for resolve in (resolve_model, described_folder):
            assert resolve(given).resolve() == tiny(family).resolve()
    with pytest.raises(InputError, match="owner/model@v2"):
        resolve_model("owner/model@v2")


def test_hub_id_in_the_local_cache(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "hub" / "models--owner--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(tiny("llama"))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    folder = resolve_model("owner/model")
    assert Checkpoint(folder).fingerprint() == Checkpoint(tiny("llama")).fingerprint()
