"""The header of a GGUF: what it is told from it, split files, and files that are damaged or are something else."""

from __future__ import annotations

import random
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from moesaic.errors import CheckpointError, InputError, MoesaicError, UnsupportedModelError
from moesaic.gguf_input.header import Texts, read_header
from moesaic.gguf_input.model import read_model
from tests.gguf_input.files import QKV, D, F, write_tiny_gguf
from tests.tiny_models import VOCAB

_VECTOR = np.ones(D, np.float32)


def test_header_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "a.gguf", "qwen2", stored=gguf.GGMLQuantizationType.Q8_0)
    header, reader = read_header(file), gguf.GGUFReader(file)
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.type, found.offset, found.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
    assert len(header.tensors) == len(reader.tensors)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            found, wanted = header.metadata[key], field.contents()
            assert found == wanted or (isinstance(found, Texts) and found.count == len(wanted))


@pytest.mark.parametrize("given", [1, 2, 3])
def test_a_split_file_is_read_from_any_part(given: int, tmp_path: Path) -> None:
    for number in range(3):
        write_tiny_gguf(tmp_path / f"m-{number + 1:05}-of-00003.gguf", "llama", split=(number, 3))
    whole = read_model(write_tiny_gguf(tmp_path / "whole.gguf", "llama"))
    model = read_model(tmp_path / f"m-{given:05}-of-00003.gguf")
    assert [file.name for file in model.header.files] == [f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    assert model.config == whole.config
    assert [tensor.name for tensor in model.tensors] == [tensor.name for tensor in whole.tensors]
    for ours, theirs in zip(model.tensors, whole.tensors, strict=True):
        np.testing.assert_array_equal(ours.read(), theirs.read())


def test_missing_parts_are_named(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "m-00002-of-00003.gguf", "llama", split=(1, 3))
    with pytest.raises(InputError, match=r"no m-00001-of-00003\.gguf, no m-00003-of-00003\.gguf"):
        read_header(file)
    shutil.move(file, tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match=r"one of 3 parts .* its name does not say which"):
        read_header(tmp_path / "renamed.gguf")


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    first = write_tiny_gguf(tmp_path / "m-00001-of-00002.gguf", "llama", split=(0, 2))
    second = tmp_path / "m-00002-of-00002.gguf"
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match="says that it is part 1"):
        read_header(first)
    write_tiny_gguf(second, "llama", split=(1, 2), leave_out=lambda name: name.startswith("blk.1"))
    with pytest.raises(CheckpointError, match=r"tensor .* is in another part as well|all parts together"):
        read_header(first)


@pytest.mark.parametrize("suffix", ["m-00001-of-00001.gguf", "M.GGUF", "sha256-abcdef"])
def test_the_name_does_not_matter(suffix: str, tmp_path: Path) -> None:
    assert read_model(write_tiny_gguf(tmp_path / suffix, "llama")).config["model_type"] == "llama"


REFUSED: dict[str, tuple[dict[str, Any], type[MoesaicError], str]] = {
    "adapter": ({"about": {"general.type": "adapter"}}, InputError, "is a LoRA adapter.*llama-export-lora"),
    "imatrix": ({"about": {"general.type": "imatrix"}}, InputError, "is an importance matrix"),
    "projector": ({"about": {"general.type": "mmproj"}}, InputError, "is a projector of images"),
    "vocabulary": ({"leave_out": lambda name: True}, CheckpointError, "holds no weights"),
    "no tokenizer": ({"tokenizer": False}, UnsupportedModelError, "has no tokenizer"),
    "key": ({"keys": {"attention.clamp_kqv": 3.0}}, UnsupportedModelError, r"would lose: llama\.attention\.clamp_kqv"),
    "key missing": ({"keys": {"attention.head_count": None}}, CheckpointError, r"lacks the key llama\.attention\.head"),
    "text for a number": ({"keys": {"embedding_length": "many"}}, CheckpointError, "embedding_length is 'many', not a"),
    "widths by layer": ({"keys": {"feed_forward_length": [F, F, 2 * F]}}, UnsupportedModelError, "for each layer"),
    "not causal": ({"keys": {"attention.causal": False}}, UnsupportedModelError, r"attention\.causal = False"),
    "value width": ({"keys": {"attention.value_length": 32}}, UnsupportedModelError, r"value_length = 32"),
    "partial rope": ({"keys": {"rope.dimension_count": 8}}, UnsupportedModelError, "rotates 8 of the 16"),
    "rope type": ({"keys": {"rope.scaling.type": "spiral"}}, UnsupportedModelError, r"rope\.scaling\.type = 'spiral'"),
    "rope divisors": (
        {"tensors": {"rope_freqs.weight": np.array([1, 3, 1, 2, 5, 4, 9, 7], np.float32)}},
        UnsupportedModelError,
        r"rope_freqs\.weight is no RoPE scaling of Llama 3's kind",
    ),
    "factor on linear rope": (
        {"keys": {"rope.scaling.attn_factor": 1.5}},
        UnsupportedModelError,
        r"rope\.scaling\.attn_factor = 1\.5",
    ),
    "yarn's slopes": (
        {"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_beta_fast": 16.0}},
        UnsupportedModelError,
        r"yarn_beta_fast = 16\.0",
    ),
    "tensor": ({"tensors": {"blk.1.attn_gate.weight": _VECTOR}}, UnsupportedModelError, r"lose: blk\.1\.attn_gate"),
    "bias of a norm": ({"biases": ("attn_norm",)}, UnsupportedModelError, r"lose: blk\.0\.attn_norm\.bias"),
    "tensor missing": (
        {"leave_out": lambda name: name == "blk.1.ffn_up.weight"},
        CheckpointError,
        r"lacks the tensor blk\.1\.ffn_up\.weight",
    ),
    "layers missing": ({"leave_out": lambda name: name.startswith("blk.2")}, CheckpointError, "no tensor of layer 2"),
    "experts in a dense architecture": ({"keys": {"expert_used_count": 2}}, UnsupportedModelError, "expert_used_count"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_carried_is_refused_by_name(case: str, tmp_path: Path) -> None:
    options, error, message = REFUSED[case]
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", **options)
    began = time.perf_counter()
    with pytest.raises(error, match=message) as caught:
        read_model(file)
    assert time.perf_counter() - began < 1
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_biases_that_llama_cpp_does_not_read_are_refused(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "smollm3", biases=QKV)
    with pytest.raises(UnsupportedModelError, match=r"lose: blk\.0\.attn_k\.bias"):
        read_model(file)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("bert", "is an encoder"), ("mamba", "is a state-space"), ("oddity", "oddity, which is not read from a GGUF")],
)
def test_other_architectures(architecture: str, message: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=message):
        read_model(tmp_path / "odd.gguf")


def test_a_type_that_gguf_does_not_know(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    content = bytearray(file.read_bytes())
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", 99)
    file.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=r"tensor blk\.0\.ffn_up\.weight is of ggml's type 99"):
        read_model(file)


def test_damaged_headers_never_end_in_another_error(tmp_path: Path) -> None:
    """1,000 headers with changed, removed or repeated bytes: each is refused in one line, or is read whole."""
    content = write_tiny_gguf(tmp_path / "good.gguf", "llama").read_bytes()
    header = min(tensor.offset for tensor in read_header(tmp_path / "good.gguf").tensors.values())
    keys = content.index(b"tokenizer.ggml.model")  # the keys of the architecture come before
    generator, file, reasons = random.Random(0), tmp_path / "bad.gguf", list[str]()
    for attempt in range(1000):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(keys if attempt % 2 else header)
            way = generator.randrange(4)
            if way == 0:
                damaged[at] = generator.randrange(256)
            elif way == 1:
                damaged[at : at + 8] = generator.choice([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**40)])
            elif way == 2:
                del damaged[at : at + generator.randint(1, 16)]
            else:
                damaged[at:at] = damaged[at : at + generator.randint(1, 64)]
        file.write_bytes(damaged[: generator.randrange(len(damaged))] if attempt % 10 == 0 else damaged)
        try:
            read_model(file)
        except MoesaicError as error:
            reasons.append(error.message)
    assert len(reasons) > 500
    assert not any("\n" in reason for reason in reasons)


def test_vocabulary_is_that_of_the_embeddings(tmp_path: Path) -> None:
    assert read_model(write_tiny_gguf(tmp_path / "tiny.gguf", "llama")).config["vocab_size"] == VOCAB
