"""A GGUF file, written tensor by tensor: only one is in memory, and the file appears when it is complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFEndian,
    GGUFValueType,
    GGUFWriter,
    quantize,
)
from torch import Tensor

from moesaic.durable import replace_file
from moesaic.errors import InputError

Pack = Callable[[np.ndarray[Any, Any], GGMLQuantizationType], np.ndarray[Any, Any]]
"""Packs the rows of an fp32 array in a type; the last axis of what it returns holds bytes."""

_OWN = (GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0)
"""Types that the package gguf packs by itself."""


@dataclass(frozen=True)
class Field:
    """A metadata value with its GGUF type; ``item`` is the type of the elements of an array."""

    value: Any
    type: GGUFValueType
    item: GGUFValueType | None = None


def field(value: bool | int | float | str | Sequence[Any]) -> Field:
    """A value as llama.cpp reads it: whole numbers as uint32, or int32 in arrays; other numbers as float32."""
    if isinstance(value, bool):
        return Field(value, GGUFValueType.BOOL)
    if isinstance(value, int):
        return Field(value, GGUFValueType.UINT32)
    if isinstance(value, float):
        return Field(value, GGUFValueType.FLOAT32)
    if isinstance(value, str):
        return Field(value, GGUFValueType.STRING)
    items = {str: GGUFValueType.STRING, int: GGUFValueType.INT32, float: GGUFValueType.FLOAT32}
    return Field(list(value), GGUFValueType.ARRAY, items[type(value[0])])


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor to be written.

    Attributes:
        name: Its name in the file.
        shape: In torch's order; GGUF stores it reversed.
        read: Returns it; called once, when its turn comes.
        precise: Kept in f32 whatever the type of the file: norms, biases, router.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    precise: bool


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Field],
    tensors: Sequence[GGUFTensor],
    types: Mapping[str, GGMLQuantizationType],
    advance: Callable[[str], None],
    pack: Pack | None = None,
) -> None:
    """Write ``path``; a failure leaves no part of it.

    Args:
        path: The file.
        architecture: llama.cpp's name.
        metadata: All keys but the architecture's name.
        tensors: In the order in which they lie in the file.
        types: The type of each, by name.
        advance: Is told the name of every tensor that is written.
        pack: Packs what is narrower than q8_0.

    Raises:
        InputError: a value does not fit f16.
        ResourceError: the disk is full.
    """

    def write(temporary: Path) -> None:
        writer = GGUFWriter(temporary, architecture, endianess=GGUFEndian.LITTLE)
        try:
            for key, entry in metadata.items():
                writer.add_key_value(key, entry.value, entry.type, entry.item)
            for tensor in tensors:
                _announce(writer, tensor, types[tensor.name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_encode(tensor, types[tensor.name], pack))
                advance(tensor.name)
            writer.flush()
        finally:
            writer.close()

    replace_file(path, write)


def expected_bytes(tensors: Sequence[GGUFTensor], types: Mapping[str, GGMLQuantizationType]) -> int:
    """Size of the tensors on disk."""
    return sum(_nbytes(tensor.shape, types[tensor.name]) for tensor in tensors)


def _nbytes(shape: tuple[int, ...], stored: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[stored]
    return int(np.prod(shape)) // block * size


def _announce(writer: GGUFWriter, tensor: GGUFTensor, stored: GGMLQuantizationType) -> None:
    # Told float16, the writer takes the shape as elements; told uint8, as bytes.
    writer.add_tensor_info(
        tensor.name, tensor.shape, np.dtype(np.float16), _nbytes(tensor.shape, stored), raw_dtype=stored
    )


def _encode(tensor: GGUFTensor, stored: GGMLQuantizationType, pack: Pack | None) -> np.ndarray[Any, Any]:
    values = tensor.read()
    if tuple(values.shape) != tensor.shape:
        raise InputError(f"{tensor.name} is {tuple(values.shape)}, not {tensor.shape}", "the checkpoint is damaged")
    if stored == GGMLQuantizationType.F16:
        half = values.to(torch.float16)
        if not torch.isfinite(half).all():
            raise InputError(
                f"{tensor.name} has values beyond the range of f16, in which it would be stored",
                "use bf16 or f32; a quantised file stores matrices whose rows are no multiple of 32 as f16",
            )
        return half.contiguous().numpy()
    full = values.to(torch.float32).contiguous().numpy()
    if stored == GGMLQuantizationType.F32:
        return full
    if stored in _OWN:
        return quantize(full, stored)
    if pack is None:
        raise ValueError(f"nothing packs {stored.name}")
    return pack(full, stored)
