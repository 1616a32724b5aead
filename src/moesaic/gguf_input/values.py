"""The values of one stored tensor, as numpy has them."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesaic.errors import UnsupportedModelError
from moesaic.gguf_input.header import StoredTensor

Array = np.ndarray[Any, np.dtype[Any]]
F32, F16, BF16 = 0, 1, 30
"""ggml's numbers of the types that hold values one by one."""
PLAIN = {F32: np.dtype("<f4"), F16: np.dtype("<f2"), BF16: np.dtype("<u2")}


def read_values(stored: StoredTensor, part: int | None = None) -> Array:
    """The tensor, or ``tensor[part]``: float32, float16, or for bf16 its bits as uint16; mapped where it is plain.

    Quantised blocks become float32, by the formulas of the package ``gguf``.
    """
    shape, offset, nbytes = stored.shape, stored.offset, stored.nbytes
    if part is not None:
        shape, nbytes = shape[1:], nbytes // shape[0]
        offset += part * nbytes
    if stored.type in PLAIN:
        kind = PLAIN[stored.type]
        return np.memmap(stored.file, dtype=kind, mode="r", offset=offset, shape=shape)
    from gguf import GGMLQuantizationType, dequantize

    rows = np.memmap(stored.file, dtype=np.uint8, mode="r", offset=offset, shape=(nbytes,))
    values = dequantize(rows.reshape(int(np.prod(shape[:-1])), -1), GGMLQuantizationType(stored.type))
    return values.reshape(shape)


def widened(values: Array) -> Array:
    """As float32."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def fits(values: Array, kind: int) -> bool:
    """Whether float32 ``values`` are all those of ``kind``, F16 or BF16, without rounding."""
    if kind == BF16:
        return not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(np.float16).astype(np.float32), values)


def check_types(tensors: dict[str, StoredTensor]) -> None:
    """Raises UnsupportedModelError, naming a tensor, where ``gguf`` cannot unpack a type of the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    tried = set(PLAIN)
    for stored in tensors.values():
        if stored.type in tried:
            continue
        kind = GGMLQuantizationType(stored.type)
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{stored.file}: tensor {stored.name} is {kind.name}, which the installed gguf cannot unpack",
                "pip install --upgrade gguf; or give a file of another quantisation",
            ) from error
        tried.add(stored.type)
