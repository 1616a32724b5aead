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
    LlamaFileType,
    quantize,
)
from torch import Tensor

from moesaic.durable import replace_file
from moesaic.errors import InputError

DTYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""Storage type of matrices -> that of a tensor and the mark of the whole file."""


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

    def stored_as(self, dtype: str) -> GGMLQuantizationType:
        """The type on disk. q8_0 packs 32 values of a row: rows of other lengths are f16."""
        if self.precise:
            return GGMLQuantizationType.F32
        if dtype == "q8_0" and self.shape[-1] % 32:
            return GGMLQuantizationType.F16
        return DTYPES[dtype][0]


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Field],
    tensors: Sequence[GGUFTensor],
    dtype: str,
    advance: Callable[[str], None],
) -> None:
    """Write ``path``; a failure leaves no part of it. ``advance`` is told the name of every tensor that is written.

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
                stored = tensor.stored_as(dtype)
                _announce(writer, tensor, stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_encode(tensor, tensor.stored_as(dtype)))
                advance(tensor.name)
            writer.flush()
        finally:
            writer.close()

    replace_file(path, write)


def expected_bytes(tensors: Sequence[GGUFTensor], dtype: str) -> int:
    """Size of the tensors on disk."""
    return sum(_nbytes(tensor.shape, tensor.stored_as(dtype)) for tensor in tensors)


def _nbytes(shape: tuple[int, ...], stored: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[stored]
    return int(np.prod(shape)) // block * size


def _announce(writer: GGUFWriter, tensor: GGUFTensor, stored: GGMLQuantizationType) -> None:
    # Told float16, the writer takes the shape as elements; told uint8, as bytes.
    writer.add_tensor_info(
        tensor.name, tensor.shape, np.dtype(np.float16), _nbytes(tensor.shape, stored), raw_dtype=stored
    )


def _encode(tensor: GGUFTensor, stored: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    values = tensor.read()
    if tuple(values.shape) != tensor.shape:
        raise InputError(f"{tensor.name} is {tuple(values.shape)}, not {tensor.shape}", "the checkpoint is damaged")
    if stored == GGMLQuantizationType.F16:
        half = values.to(torch.float16)
        if not torch.isfinite(half).all():
            raise InputError(
                f"{tensor.name} has values beyond the range of f16, in which it would be stored",
                "use bf16 or f32; a q8_0 file stores matrices whose rows are no multiple of 32 as f16",
            )
        return half.contiguous().numpy()
    full = values.to(torch.float32).contiguous().numpy()
    return full if stored == GGMLQuantizationType.F32 else quantize(full, stored)
