"""The header of a GGUF file, and of a split one all headers: metadata and where each tensor lies.

Read by hand and not with ``gguf.GGUFReader``, which makes an array of every token of the vocabulary: 6.7 s for
SmolLM2's, where a refusal should take less than one. Layout: the GGUF specification of ggml, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moesaic.errors import CheckpointError, InputError, UnsupportedModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# GGUF's number of a value type -> struct's letter.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Texts:
    """A long array of texts, such as a vocabulary, of which only the length is read."""

    count: int


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. ``shape`` in torch's order, ``type`` is ggml's number, ``offset`` counts from the start."""

    name: str
    shape: tuple[int, ...]
    type: int
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What the headers of all files of one model say.

    Attributes:
        files: The parts, in order.
        metadata: Of the first part.
        tensors: Of all parts.
        tokenizer_bytes: Size of the metadata that describe the tokenizer.
    """

    files: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    tokenizer_bytes: int

    @property
    def file(self) -> Path:
        """The first part, which has the metadata."""
        return self.files[0]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it, or ""."""
        return str(self.metadata.get("general.architecture") or "")


def is_gguf(file: Path) -> bool:
    """Whether a file begins as a GGUF does, whatever its name."""
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read_header(file: Path) -> Header:
    """The header of ``file``; with those of all other parts when it is one part of a split GGUF.

    Raises:
        CheckpointError: the file is damaged or ends too early.
        InputError: parts are missing, or the package ``gguf`` is.
        UnsupportedModelError: tensors of a type that the installed ``gguf`` does not know.
    """
    own = _read(file)
    count = own.metadata.get("split.count", 1)
    match = _PART.fullmatch(file.name)
    if "split.count" not in own.metadata and match:
        count = int(match[3])
    if count == 1 or not isinstance(count, int):
        return own
    if match is None or int(match[3]) != count:
        raise InputError(
            f"{file} is one of {count} parts of a split GGUF, and its name does not say which",
            f"name the parts NAME-00001-of-{count:05}.gguf and so on, beside each other",
        )
    names = [f"{match[1]}-{number:05}-of-{match[3]}{match[4]}" for number in range(1, count + 1)]
    if missing := [name for name in names if not (file.parent / name).is_file()]:
        raise InputError(
            f"{file} is one of {count} parts of a split GGUF, and beside it there is no {', no '.join(missing)}",
            "download all parts into one folder",
        )
    return _joined([own if name == file.name else _read(file.parent / name) for name in names])


def _joined(parts: list[Header]) -> Header:
    tensors: dict[str, StoredTensor] = {}
    first = parts[0]
    for number, part in enumerate(parts):
        if part.metadata.get("split.no", number) != number:
            raise CheckpointError(
                f"{part.file} says that it is part {part.metadata['split.no'] + 1}", "download the parts again"
            )
        if twice := next((name for name in part.tensors if name in tensors), None):
            raise CheckpointError(f"{part.file}: tensor {twice} is in another part as well", "download the parts again")
        tensors |= part.tensors
    stated = first.metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise CheckpointError(
            f"{first.file}: all parts together have {len(tensors)} tensors, not {stated}", "download the parts again"
        )
    return Header(tuple(part.file for part in parts), first.metadata, tensors, first.tokenizer_bytes)


def _read(file: Path) -> Header:
    if not is_gguf(file):
        raise CheckpointError(f"{file} is not a GGUF file", "download it again")
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(file, data)
    except (struct.error, OverflowError, UnicodeDecodeError) as error:
        raise _damaged(file, "its header ends too early or is no header") from error


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged or incomplete: {reason}", "download it again")


def _parse(file: Path, data: mmap.mmap) -> Header:
    cursor = _Cursor(data, len(MAGIC))
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise UnsupportedModelError(f"{file} is a GGUF of version {version}", "versions 2 and 3 are read")
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    if max(tensor_count, key_count) > len(data):
        raise _damaged(file, "its header counts more entries than the file has bytes")
    metadata: dict[str, Any] = {}
    tokenizer_bytes = 0
    for _ in range(key_count):
        key = cursor.text()
        if key in metadata:
            raise _damaged(file, f"key {key} is there twice")
        begin = cursor.place
        metadata[key] = cursor.value(cursor.number("I"), every=key.startswith("general."))
        tokenizer_bytes += cursor.place - begin if key.startswith("tokenizer.") else 0
    entries = [(cursor.text(), *cursor.tensor()) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _damaged(file, f"general.alignment is {alignment!r}")
    start = -(-cursor.place // alignment) * alignment
    sizes = _block_sizes() if entries else lambda _: None
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in entries:
        tensor = _place(file, name, shape, kind, start + offset, sizes(kind))
        if name in tensors:
            raise _damaged(file, f"tensor {name} is there twice")
        if tensor.offset + tensor.nbytes > len(data):
            raise _damaged(file, f"tensor {name} ends at byte {tensor.offset + tensor.nbytes}, the file at {len(data)}")
        tensors[name] = tensor
    return Header((file,), metadata, tensors, tokenizer_bytes)


def _place(
    file: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, block: tuple[int, int] | None
) -> StoredTensor:
    if block is None:
        raise UnsupportedModelError(
            f"{file}: tensor {name} is of ggml's type {kind}, which the installed gguf does not know",
            "pip install --upgrade gguf; or give a file of another quantisation",
        )
    values, nbytes = block
    if not shape or prod(shape) < 1 or shape[-1] % values:
        raise _damaged(file, f"tensor {name} has the shape {list(shape)}")
    return StoredTensor(name, shape, kind, file, offset, prod(shape) // values * nbytes)


def _block_sizes() -> Callable[[int], tuple[int, int] | None]:
    """ggml's number of a type -> values in one block and bytes of it."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as error:
        raise InputError("reading GGUF needs the package gguf", "pip install 'moesaic[gguf]'") from error
    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    return sizes.get


class _Cursor:
    """Reads little-endian values one after another; struct.error where the file ends."""

    def __init__(self, data: mmap.mmap, place: int) -> None:
        self._data = data
        self.place = place

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self._data, self.place)
        self.place += struct.calcsize(f"<{letter}")
        return value

    def _bytes(self) -> bytes:
        length = self.number("Q")
        end = self.place + length
        if end > len(self._data):
            raise struct.error("text beyond the end of the file")
        content = self._data[self.place : end]
        self.place = end
        return content

    def text(self) -> str:
        """A name. struct.error for one that no line could show."""
        text = self._bytes().decode()
        if not text.isprintable():
            raise struct.error("a name with control characters")
        return text

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        """Shape in torch's order, type and offset."""
        count = self.number("I")
        if count > _MOST_DIMENSIONS:
            raise struct.error("too many dimensions")
        dimensions = tuple(self.number("Q") for _ in range(count))
        return dimensions[::-1], self.number("I"), self.number("Q")

    def value(self, kind: int, *, every: bool) -> Any:
        """``every``: read all texts of an array, not only how many there are."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            # Some files hold bytes that are no UTF-8 in names and templates.
            return self._bytes().decode(errors="replace")
        if kind != _ARRAY:
            raise struct.error(f"value type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item in _NUMBERS:
            letter = _NUMBERS[item]
            size = struct.calcsize(f"<{letter}")
            if self.place + count * size > len(self._data):
                raise struct.error("array beyond the end of the file")
            values = list(struct.unpack_from(f"<{count}{letter}", self._data, self.place))
            self.place += count * size
            return values
        if item != _STRING:
            raise struct.error(f"array of type {item}")
        return [self.value(_STRING, every=True) for _ in range(count)] if every else self._skip(count)

    def _skip(self, count: int) -> Texts:
        place, end = self.place, len(self._data)
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            place += 8 + unpack(self._data, place)[0]
            if place > end:
                raise struct.error("text beyond the end of the file")
        self.place = place
        return Texts(count)
