"""The documents of a calibration source: text files, folders of them, and files of records, compressed or not.

A document is a text, or the messages of a conversation (:mod:`moesaic.calibration.chat` makes a text of them).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from moesaic.calibration.chat import Messages, is_messages
from moesaic.calibration.config import COMPRESSED, MIX_NAME, RECORD_SUFFIXES, Source
from moesaic.calibration.samples import SAMPLES, sample_text
from moesaic.errors import InputError

Document = str | Messages

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst"})
"""Files of a folder that are read; a file given by its own name may have any suffix."""

DEFAULT_FIELDS = ("text", "messages", "conversations")
"""Where a record's text is looked for when no field is named: in the first of these that it has."""

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

# How a file that is no UTF-8 text begins -> what it is, and what to do about it.
_MAGIC = (
    (b"\xff\xfe", "UTF-16 text", "iconv -f utf-16 -t utf-8 {file} > NEW"),
    (b"\xfe\xff", "UTF-16 text", "iconv -f utf-16 -t utf-8 {file} > NEW"),
    (b"\x1f\x8b", "compressed by gzip", "give it the suffix .gz"),
    (b"BZh", "compressed by bzip2", "give it the suffix .bz2"),
    (b"\xfd7zXZ", "compressed by xz", "give it the suffix .xz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it: zstd -d {file} -o NEW"),
    (b"PK\x03\x04", "a zip archive", "unpack it, and give the files that are in it"),
    (b"PAR1", "a parquet file", "give it the suffix .parquet"),
    (b"%PDF", "a PDF", "give its text: pdftotext {file} NEW.txt"),
)
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


def read_documents(source: Source, limit: int) -> Iterator[Document]:
    """The documents of a source in their order; of each text file at most ``limit`` + 1 characters.

    Raises InputError: a path is missing or cannot be read, a folder has no text files, a file is not what its suffix
    says, a record lacks the field or holds no text there, pyarrow is missing.
    """
    if source.builtin:
        yield sample_text(source.name)
        return
    path = Path(source.name).expanduser()
    try:
        if not path.exists():
            raise InputError(
                f"calibration source {source.name!r} does not exist",
                f"give a path, {MIX_NAME} or one of {', '.join(SAMPLES)}",
            )
        if source.kind == "text" or path.is_dir():
            for file in _text_files(path) if path.is_dir() else [path]:
                with _open_text(file) as stream:
                    yield stream.read(limit + 1)
        else:
            for place, record in _RECORDS[source.kind](path, source.field):
                yield from _documents_of(path, place, record, source.field)
    except _DAMAGED as error:
        raise InputError(f"{path} is damaged: {error or 'it ends too early'}", "fetch or pack it again") from error
    except OSError as error:
        raise InputError(
            f"calibration source {path} cannot be read: {error.strerror or error}", "check its permissions"
        ) from error


def read_text(path: Path) -> str:
    """A whole text file, UTF-8, compressed or not. Raises InputError, or OSError when it cannot be read."""
    with _open_text(path) as stream:
        return stream.read()


def _documents_of(path: Path, place: str, record: Any, field: str | None) -> Iterator[Document]:
    """The documents of one record; none where its field is empty."""
    if field is None and (isinstance(record, str) or is_messages(record)):  # an array of nothing but documents
        yield record
        return
    if not isinstance(record, Mapping):
        raise InputError(f"{path} {place} is no JSON object", "write one object for each text")
    name = field or next((name for name in DEFAULT_FIELDS if name in record), DEFAULT_FIELDS[0])
    if name not in record:
        raise _no_field(path, place, name, list(map(str, record)))
    value = record[name]
    if value is None or isinstance(value, str):
        yield value or ""
    elif is_messages(value):
        yield value
    elif isinstance(value, Sequence) and all(isinstance(part, str) for part in value):
        yield from value
    elif isinstance(value, bytes):
        try:
            yield value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} {place}: {name!r} holds bytes that are no UTF-8", "write it as text") from error
    else:
        kind = type(value).__name__
        texts = [str(key) for key, other in record.items() if isinstance(other, str) or is_messages(other)]
        raise InputError(
            f"{path} {place}: {name!r} is neither text nor chat messages but of the type {kind}",
            f"choose another field: {', '.join(texts)}; write {path.name}:FIELD"
            if texts
            else "take this record out, or write its text there",
        )


def _no_field(path: Path, place: str, name: str, found: Sequence[str]) -> InputError:
    return InputError(
        f"{path} {place} has no text field {name!r}",
        f"its fields are {', '.join(found) or 'none'}; write {path.name}:FIELD",
    )


def _text_files(folder: Path) -> list[Path]:
    """The folder's text files, at any depth, hidden ones left out, in the order of their relative paths."""
    seen = [
        path
        for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix())
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    files = [path for path in seen if path.suffix.lower() in TEXT_SUFFIXES]
    if not files:
        records = next((path for path in seen if Source(name=str(path)).kind != "text"), None)
        hint = f"name its files of records one by one: --calib {records}" if records else "give a file by its own name"
        raise InputError(f"no text files in folder {folder}: it has no {', '.join(sorted(TEXT_SUFFIXES))}", hint)
    return files


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """A text file from its beginning, unpacked where its suffix says so. Opened once: it may be a pipe."""
    start = b""
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as raw:
            buffered = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
            start = buffered.peek(8)[:8]
            with io.TextIOWrapper(buffered, encoding="utf-8-sig") as stream:
                yield stream
    except UnicodeDecodeError as error:
        for magic, kind, hint in _MAGIC:
            if start.startswith(magic):
                raise InputError(f"{path} is {kind}", hint.format(file=path)) from error
        raise InputError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x}, {error.reason}",
            f"if it is Latin-1: iconv -f latin1 -t utf-8 {path} > NEW",
        ) from error


def _jsonl(path: Path, _field: str | None) -> Iterator[tuple[str, Any]]:
    with _open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    reason = getattr(error, "msg", "nested too deeply")
                    raise InputError(
                        f"{path} line {number} is not valid JSON: {reason}", "write one object per line"
                    ) from error


def _json(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    """An array of records, the one array of an object (``{"data": [...]}``), one record, or lines after all."""
    with _open_text(path) as stream:
        text = stream.read()
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data" and text.lstrip().startswith("{"):
            yield from _jsonl(path, field)
            return
        reason = f"{error.msg} in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise InputError(f"{path} is not valid JSON: {reason}", "an array of objects is read, or .jsonl") from error
    if isinstance(content, dict) and (field or DEFAULT_FIELDS[0]) not in content:
        arrays = [value for value in content.values() if isinstance(value, list)]
        if len(arrays) == 1 and not is_messages(arrays[0]):
            content = arrays[0]
    for number, record in enumerate(content if isinstance(content, list) else [content], start=1):
        yield f"record {number}", record


def _csv(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    yield from _table(path, field, ",")


def _tsv(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    yield from _table(path, field, "\t")


def _table(path: Path, field: str | None, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Rows under a first row of names."""
    shortest = csv.field_size_limit(sys.maxsize)  # a document is longer than the 128 KiB that are allowed otherwise
    try:
        with _open_text(path) as stream:
            reader = csv.DictReader(stream, delimiter=delimiter)
            names = reader.fieldnames or []
            if field not in names and (field or not any(name in names for name in DEFAULT_FIELDS)):
                raise _no_field(path, "line 1", field or DEFAULT_FIELDS[0], list(map(str, names)))
            for row in reader:
                yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path} is not a table: {error}", "write rows of values below a row of names") from error
    finally:
        csv.field_size_limit(shortest)


def _parquet(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"reading {path} needs pyarrow", "pip install 'moesaic[parquet]'") from error
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a parquet file", "check the path") from error
    with file:
        names = file.schema_arrow.names
        name = field or next((name for name in DEFAULT_FIELDS if name in names), DEFAULT_FIELDS[0])
        if name not in names or not _may_hold_text(file.schema_arrow.field(name).type):
            raise InputError(
                f"{path} has no text column {name!r}", f"its columns are {', '.join(names)}; write {path.name}:COLUMN"
            )
        number = 0
        try:
            for batch in file.iter_batches(batch_size=256, columns=[name]):
                for row in batch.column(0).to_pylist():  # dictionary columns give their values
                    number += 1
                    yield f"row {number}", {name: row}
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged: {error}", "fetch it again") from error


def _may_hold_text(kind: Any) -> bool:
    """Whether a column's arrow type is text, categories of it, or a list: of texts or of chat messages."""
    import pyarrow.types as is_of

    if is_of.is_dictionary(kind):
        return _may_hold_text(kind.value_type)
    lists = is_of.is_list(kind) or is_of.is_large_list(kind) or is_of.is_fixed_size_list(kind)
    texts = is_of.is_string(kind) or is_of.is_large_string(kind) or is_of.is_string_view(kind)
    return lists or texts or is_of.is_binary(kind) or is_of.is_large_binary(kind) or is_of.is_binary_view(kind)


_RECORDS = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _tsv, "parquet": _parquet}
assert set(_RECORDS) == set(RECORD_SUFFIXES.values())
assert set(_OPENERS) == set(COMPRESSED)
