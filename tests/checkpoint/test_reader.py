"""Checkpoint: intact folders of every shape are read, damaged or unsafe ones are refused before any weight is read."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moesaic.checkpoint.reader import CONFIG, INDEX, WEIGHTS, Checkpoint
from moesaic.errors import CheckpointError, InputError, MoesaicError, UnsupportedModelError
from tests.tiny_models import build_tiny

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama_bias", tmp_path_factory.mktemp("sharded") / "m", max_shard_size="20KB")


def test_single_file(tiny: Tiny) -> None:
    checkpoint = Checkpoint(tiny("gpt2"))
    stored = load_file(tiny("gpt2") / WEIGHTS)
    assert set(checkpoint.names) == set(stored)
    assert checkpoint.config["model_type"] == "gpt2"
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in stored.values())
    for name, tensor in stored.items():
        info = checkpoint.info(name)
        assert (info.dtype, info.shape, info.nbytes) == ("bfloat16", tuple(tensor.shape), tensor.nbytes)
        assert info.file == tiny("gpt2") / WEIGHTS
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_shards(sharded: Path, tiny: Tiny) -> None:
    checkpoint, single = Checkpoint(sharded), Checkpoint(tiny("llama_bias"))
    assert len(checkpoint.files) > 2
    assert set(checkpoint.names) == set(single.names)
    for name in single.names:
        assert torch.equal(checkpoint.tensor(name), single.tensor(name))


def test_a_single_file_goes_before_an_index_as_in_transformers(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "m"))
    build_tiny("llama_bias", folder, seed=5)  # adds model.safetensors
    shutil.copy(sharded / INDEX, folder)
    name = "model.norm.weight"
    loaded = AutoModelForCausalLM.from_pretrained(folder).get_parameter(name)
    assert torch.equal(Checkpoint(folder).tensor(name), loaded)


def test_symbolic_links_of_the_hub_cache(tiny: Tiny, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    shutil.copytree(tiny("llama"), blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert Checkpoint(snapshot).fingerprint() == Checkpoint(tiny("llama")).fingerprint()
    assert [file.name for file in Checkpoint(snapshot).side_files()] == ["generation_config.json", *TOKENIZER]


TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]


def test_side_files(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "m"))
    for name in (
        "LICENSE",
        "chat_template.jinja",
        "spiece.model",
        "README.md",
        "optimizer.pt",
        ".gitattributes",
        "run.py",
    ):
        (folder / name).write_text("x")
    (folder / "tokenizer_backup").mkdir()
    names = [file.name for file in Checkpoint(folder).side_files()]
    assert names == ["LICENSE", "chat_template.jinja", "generation_config.json", "spiece.model", *TOKENIZER]


def test_fingerprint_follows_every_byte_of_the_model(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "m"))
    original = Checkpoint(folder).fingerprint()
    assert original == Checkpoint(sharded).fingerprint()
    (folder / "README.md").write_text("a note changes nothing")
    assert Checkpoint(folder).fingerprint() == original
    seen = {original}
    for file in (*Checkpoint(folder).files, folder / CONFIG):
        content = file.read_bytes()
        changed = (
            content.replace(b'"silu"', b'"relu"') if file.name == CONFIG else content[:-1] + bytes([content[-1] ^ 1])
        )
        stat = file.stat()
        file.write_bytes(changed)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the change must not be seen by its time alone
        seen.add(Checkpoint(folder).fingerprint())
        file.write_bytes(content)
    assert len(seen) == 2 + len(Checkpoint(folder).files)
    assert Checkpoint(folder).fingerprint() == original


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_float_dtypes(dtype: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(build_tiny("llama", tmp_path, dtype=dtype))
    name = checkpoint.names[0]
    assert checkpoint.info(name).dtype == dtype
    assert checkpoint.tensor(name).dtype == getattr(torch, dtype)
    assert checkpoint.info(name).nbytes == checkpoint.tensor(name).nbytes


def with_tensors(folder: Path, **extra: torch.Tensor) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, **{name.replace("__", "."): value for name, value in extra.items()}}, folder / WEIGHTS)


def test_byte_masks_of_old_checkpoints_are_no_quantised_weights(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("gpt_neox"), tmp_path / "m"))
    mask, ids = torch.ones(1, 1, 4, 4, dtype=torch.uint8), torch.arange(4)
    with_tensors(folder, a__attention__bias=mask, b__attention__bias=mask.bool(), embeddings__position_ids=ids)
    assert Checkpoint(folder).tensor("a.attention.bias").dtype == torch.uint8


def test_unknown_tensor_has_a_suggestion(tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor model\.norm\.wight.*nearest is model\.norm\.weight"):
        Checkpoint(tiny("llama")).tensor("model.norm.wight")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_tensor(value: float, dtype: torch.dtype, tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "m"))
    with_tensors(folder, bad=torch.tensor([1.0, value, 2.0], dtype=dtype), good=torch.ones(3, dtype=dtype))
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.finite_tensor("good"), torch.ones(3, dtype=dtype))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor bad has 1 NaN or inf"):
        checkpoint.finite_tensor("bad")


def test_shard_removed_after_opening(sharded: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(Path(shutil.copytree(sharded, tmp_path / "m")))
    name = checkpoint.names[0]
    checkpoint.info(name).file.unlink()
    with pytest.raises(CheckpointError, match=f"cannot read tensor {name}"):
        checkpoint.tensor(name)


# --- damaged and unsafe folders: each entry breaks a copy of the sharded model, or of a single-file one ---


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    edit_json(folder / INDEX, lambda index: edit(index["weight_map"]))


def one_file(folder: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 3)


def pickles_only(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def duplicate(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)


OVERLAP = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}
BEYOND = {"a": entry("F32", [4], 0, 16)}
GAP = {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}
WRONG_SIZE = {"a": entry("F32", [3], 0, 8)}

# name: (how to break it, error, part of the message, part of the hint)
BROKEN: dict[str, tuple[Callable[[Path], object], type[MoesaicError], str, str]] = {
    "truncated shard": (truncate, CheckpointError, "model-00002-of-.* is truncated or damaged", "again"),
    "empty shard": (lambda f: first_shard(f).write_bytes(b""), CheckpointError, "model-00001.*truncated", "again"),
    "missing shard": (lambda f: first_shard(f).unlink(), CheckpointError, "model-00001.*is missing", "incomplete"),
    "overlap": (lambda f: one_file(f, OVERLAP, bytes(12)), CheckpointError, "truncated or damaged", "again"),
    "beyond the end": (lambda f: one_file(f, BEYOND, bytes(8)), CheckpointError, "truncated or damaged", "again"),
    "gap": (lambda f: one_file(f, GAP, bytes(12)), CheckpointError, "truncated or damaged", "again"),
    "offsets against shape": (lambda f: one_file(f, WRONG_SIZE, bytes(8)), CheckpointError, "damaged", "again"),
    "trailing bytes": (lambda f: one_file(f, {}, b"xx"), CheckpointError, "damaged", "again"),
    "header no JSON": (lambda f: one_file(f, b"not json", b""), CheckpointError, "damaged", "again"),
    "no tensors": (lambda f: one_file(f, {}, b""), CheckpointError, "no tensors", "again"),
    "fp8": (
        lambda f: one_file(f, {"a": entry("F8_E4M3", [4], 0, 4)}, bytes(4)),
        UnsupportedModelError,
        "quantised",
        "full",
    ),
    "int8": (lambda f: one_file(f, {"a": entry("I8", [4], 0, 4)}, bytes(4)), UnsupportedModelError, "a is I8", "full"),
    "uint8": (lambda f: one_file(f, {"a": entry("U8", [4], 0, 4)}, bytes(4)), UnsupportedModelError, "a is U8", "full"),
    "gptq": (
        lambda f: one_file(f, {"a": entry("I32", [1], 0, 4)}, bytes(4)),
        UnsupportedModelError,
        "a is I32",
        "full",
    ),
    "index to a parent": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": "../secret.safetensors"})),
        CheckpointError,
        r"names '\.\./secret\.safetensors'",
        "do not use",
    ),
    "index to an absolute path": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": "/etc/x.safetensors"})),
        CheckpointError,
        "names '/etc/x.safetensors'",
        "do not use",
    ),
    "index to a folder": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": ".."})),
        CheckpointError,
        r"names '\.\.'",
        "do not use",
    ),
    "index to a name too long for a file": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": f"{'x' * 300}.safetensors"})),
        CheckpointError,
        "names 'xxx",
        "do not use",
    ),
    "index with a number": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": 3})),
        CheckpointError,
        "names 3",
        "do not use",
    ),
    "index to the wrong shard": (
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": first_shard(f).name})),
        CheckpointError,
        "model.norm.weight is not in model-00001",
        "again",
    ),
    "index with a phantom": (
        lambda f: edit_index(f, lambda m: m.update({"phantom": first_shard(f).name})),
        CheckpointError,
        "phantom is not in model-00001",
        "again",
    ),
    "index without map": (lambda f: edit_json(f / INDEX, dict.clear), CheckpointError, "no weight_map", "again"),
    "index without metadata": (
        lambda f: edit_json(f / INDEX, lambda index: index.pop("metadata")),
        CheckpointError,
        "has no metadata, without which transformers",
        '"metadata": {}',
    ),
    "shard in capitals": (
        lambda f: first_shard(f).rename(f / first_shard(f).name.upper()),
        CheckpointError,
        "model-00001.*is missing",
        "rename MODEL-00001",
    ),
    "weights under another name": (
        lambda f: [file.unlink() for file in f.glob("*.safetensors*")] and (f / "weights.safetensors").write_bytes(b""),
        CheckpointError,
        "weights.safetensors but neither",
        "rename it to model.safetensors",
    ),
    "index no JSON": (lambda f: (f / INDEX).write_text("{"), CheckpointError, f"{INDEX} is not readable", "again"),
    "index missing": (lambda f: (f / INDEX).unlink(), CheckpointError, "neither model.safetensors nor", "index"),
    "tensor twice": (duplicate, CheckpointError, "is both in model-00001.* and in model-00002", "shards"),
    "config missing": (lambda f: (f / CONFIG).unlink(), CheckpointError, "has no config.json", "Hugging Face"),
    "config no JSON": (
        lambda f: (f / CONFIG).write_text("{,"),
        CheckpointError,
        "config.json is not readable",
        "again",
    ),
    "config binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), CheckpointError, "not readable", "again"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), CheckpointError, "not hold a JSON object", "again"),
    "pickle only": (pickles_only, CheckpointError, "only pickled weights .pytorch_model.bin", "save_pretrained"),
    "no weights": (
        lambda f: [file.unlink() for file in f.glob("*.safetensors*")],
        CheckpointError,
        "has no weights",
        "incomplete",
    ),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        UnsupportedModelError,
        "PEFT adapter",
        "docs/checkpoints.md",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder(name: str, sharded: Path, tmp_path: Path) -> None:
    damage, error, message, hint = BROKEN[name]
    folder = Path(shutil.copytree(sharded, tmp_path / "m"))
    Checkpoint(folder)
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        Checkpoint(folder)
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)
    assert type(caught.value) is error


def test_dangling_link(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "m"))
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../../blobs/gone")
    with pytest.raises(CheckpointError, match="has no weights"):
        Checkpoint(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        Checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="is empty"):
        Checkpoint(tmp_path)
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"no config\.json.*give the file itself: .*model-q4\.gguf"):
        Checkpoint(tmp_path)
