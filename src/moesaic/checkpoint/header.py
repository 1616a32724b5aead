"""The header of one safetensors file: which tensors it holds. Needs neither torch nor numpy, but to check tiling."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from moesaic.errors import CheckpointError, UnsupportedModelError

_LFS_POINTER = b"version https://git-lfs"

# safetensors code -> torch name and bytes per element.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
}
# Attention masks of old GPT-NeoX and GPT-2 files are bytes, and so are the codes of our own routers and int8 weights;
# every other integer tensor is a quantised weight.
_BYTE_BUFFERS = (".attention.bias", ".attn.bias", ".router.gate_codes", ".router.up_codes", ".rest.codes")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and how large. ``dtype`` is torch's name for it, ``nbytes`` its size on disk."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a weight file. It begins with the header's length in eight bytes."""
    found, last = {}, 0
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if 8 + length > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items()):
            code, shape, (_, end) = str(entry["dtype"]), tuple(map(int, entry["shape"])), entry["data_offsets"]
            last = max(last, int(end))
            found[name] = _tensor_info(file, name, code, shape)
        if 8 + length + last != size:
            raise ValueError(f"{size} bytes are not what the header describes")
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError, OverflowError) as error:
        raise _damaged(file, error) from error
    return found


def check_tiling(file: Path) -> None:
    """Have the library check that the tensors tile the file without gap or overlap."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CheckpointError:
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return CheckpointError(f"{file} is a pointer of Git LFS, not the file", "git lfs pull, in that folder")
    return CheckpointError(f"{file} is truncated or damaged: {error}", "the download is incomplete: fetch it again")


def _tensor_info(file: Path, name: str, code: str, shape: tuple[int, ...]) -> TensorInfo:
    if code not in _DTYPES or (code == "U8" and not name.endswith(_BYTE_BUFFERS)):
        raise UnsupportedModelError(
            f"{file}: tensor {name} is {code}: the weights are quantised",
            "convert the full-precision original, then quantise the result",
        )
    dtype, size = _DTYPES[code]
    return TensorInfo(file, dtype, shape, size * math.prod(shape))
