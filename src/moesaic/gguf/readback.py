"""Does a GGUF hold the weights it was written from? Every tensor is read back and compared; no engine is needed.

Each value may differ by what its type rounds, half the distance to the neighbouring number:

- f32: not at all.
- f16, bf16: |x| / 2^11 and |x| / 2^8 for 11 and 8 significant bits, and half of the smallest f16, 2^-25.
- q8_0: the largest of the block / 254, as 127 steps reach it; and that over 2^11, as the scale is an f16.
- Narrower types choose their scales for the least error of a whole block, so each row is judged by its norm. A right
  row is off by a share of it: at most half of ``_ROW`` on normal numbers, less than it on heavy-tailed ones [OURS:
  measured]. A wrong row is off by sqrt(2).

Rows in another order, another expert, a lost tensor or a norm of 1 differ by more, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from moesaic.errors import VerificationError
from moesaic.gguf.file import GGUFTensor

_TINY = {GGMLQuantizationType.F16: 2.0**-25, GGMLQuantizationType.BF16: 0.0, GGMLQuantizationType.Q8_0: 127 * 2.0**-25}
_RELATIVE = {GGMLQuantizationType.F16: 2.0**-11, GGMLQuantizationType.BF16: 2.0**-8}
_Q8_0 = 1 / 254 + 2.0**-11
_ROW = {
    GGMLQuantizationType.Q6_K: 0.1,
    GGMLQuantizationType.Q5_K: 0.2,
    GGMLQuantizationType.Q5_1: 0.25,
    GGMLQuantizationType.Q5_0: 0.25,
    GGMLQuantizationType.Q4_K: 0.3,
    GGMLQuantizationType.Q4_0: 0.4,
    GGMLQuantizationType.Q3_K: 0.5,
    GGMLQuantizationType.Q2_K: 1.0,
}
_LOST = 2.0**-20
"""Scales are f16: smaller values may become zero."""
_BLOCK = 32
_SLACK = 1 + 1e-6  # the bound is computed in fp32


_COARSE = 1e-3
"""Share of a tensor's norm that rounding to f16 takes only where values are below its range; else at most 3e-4."""


def check_tensors(file: Path, tensors: Sequence[GGUFTensor], types: Mapping[str, GGMLQuantizationType]) -> list[str]:
    """Compare all tensors of ``file``, stored as ``types``, with what ``tensors`` read.

    Memory: one tensor three times, in fp32.

    Returns the names of the tensors whose values are so small that f16 keeps little of them.

    Raises VerificationError, which names the first tensor that is missing, too many, or differs by more than rounding.
    """
    coarse: list[str] = []
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    expected_names = {tensor.name for tensor in tensors}
    if wrong := sorted(stored.keys() ^ expected_names):
        raise _wrong(file, wrong[0], "is missing" if wrong[0] in expected_names else "has no source")
    for tensor in tensors:
        found = stored[tensor.name]
        kind = types[tensor.name]
        if found.tensor_type != kind or tuple(int(size) for size in reversed(found.shape)) != tensor.shape:
            raise _wrong(file, tensor.name, "has another type or shape")
        expected = tensor.read().float().numpy()
        actual = dequantize(found.data, kind).reshape(tensor.shape)
        far = _far(actual, expected, kind)
        if far.any():
            what = "rows" if kind in _ROW else "values"
            raise _wrong(file, tensor.name, f"differs in {int(far.sum())} of {far.size} {what} from the folder's")
        if kind == GGMLQuantizationType.F16 and np.linalg.norm(actual - expected) > _COARSE * np.linalg.norm(expected):
            coarse.append(tensor.name)
    return coarse


def _far(actual: np.ndarray, expected: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Which values, or rows, are off by more than rounding; NaN is far from everything."""
    if kind not in _ROW:
        return ~(np.abs(actual - expected) <= _allowed(expected, kind))
    error, size = np.linalg.norm(actual - expected, axis=-1), np.linalg.norm(expected, axis=-1)
    return ~(error <= _ROW[kind] * size + _LOST * expected.shape[-1] ** 0.5)


def _allowed(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray | float:
    if kind == GGMLQuantizationType.F32:
        return 0.0
    if kind != GGMLQuantizationType.Q8_0:
        return (np.abs(values) * _RELATIVE[kind] + _TINY[kind]) * _SLACK
    largest = np.abs(values.reshape(-1, _BLOCK)).max(-1, keepdims=True)
    bound = (largest * _Q8_0 + _TINY[kind]) * _SLACK
    return np.broadcast_to(bound, (len(bound), _BLOCK)).reshape(values.shape)


def _wrong(file: Path, name: str, reason: str) -> VerificationError:
    return VerificationError(f"{file.name}: tensor {name} {reason}", "is the disk sound? report it if it stays so")
