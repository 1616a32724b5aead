"""From calibration sources to token windows: read, join, tokenise, cut at random places, mix by weight.

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor

from moesaic.calibration.config import MIX_NAME, CalibrationConfig, Source
from moesaic.calibration.samples import SAMPLES, sample_text
from moesaic.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst"})
"""Files of a folder that are read; a file given by its own name may have any suffix."""

DOCUMENT_JOINT = "\n\n"
DEFAULT_FIELD = "text"

CHARACTERS_PER_TOKEN = 64
"""How much of a source is read per calibration token, about 16 times what is needed: windows lie in its first part."""


@dataclass(frozen=True)
class Windows:
    """Calibration text as token ids.

    Attributes:
        ids_NW: Token ids, int64 [N, W].
        fingerprint: SHA-256 of the ids and their shape; equal text, config and tokenizer give equal fingerprints.
        source_tokens: Tokens taken from each source, by label.
        notes: What the user should know, one line each (window clipped, text cut, a source left without a window).
    """

    ids_NW: Tensor
    fingerprint: str
    source_tokens: dict[str, int]
    notes: tuple[str, ...] = ()


def build_windows(
    config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, max_positions: int | None = None
) -> Windows:
    """Read the sources of ``config`` and cut them into token windows.

    The documents of a source are joined by blank lines into one token stream, no special tokens added. Windows lie at
    random places of it, by the seed, none overlapping another; the sources share them by weight (largest remainder).

    Args:
        config: Sources, number of tokens, window, seed.
        tokenizer: The model's tokenizer.
        max_positions: Longest context of the model; windows are clipped to it.

    Raises:
        InputError: A path is missing or unreadable, a folder has no text files, a text is empty or not UTF-8, a record
            is not valid JSON or lacks the field, pyarrow is missing, or a source has fewer tokens than its share.
    """
    sources = config.expanded()
    window = min(config.window, config.tokens, max_positions or config.window)
    notes = []
    if window < min(config.window, config.tokens):
        notes.append(f"calibration windows have {window} tokens, the longest context of the model, not {config.window}")
    shares = largest_remainder([source.weight for source in sources], math.ceil(config.tokens / window))
    windows: list[list[int]] = []
    source_tokens = {}
    for index, (source, share) in enumerate(zip(sources, shares, strict=True)):
        text, cut = read_source(source, limit=CHARACTERS_PER_TOKEN * config.tokens)
        if cut and not source.builtin:
            notes.append(f"calibration source {source.label}: only its first {len(text):,} characters are used")
        if share == 0:
            notes.append(f"calibration source {source.label} is too light for a window; raise the number of tokens")
        ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        _check_length(source, len(ids), window, share)
        starts = _starts(len(ids), window, share, random.Random(f"{config.seed}:{index}"))
        windows += [ids[start : start + window] for start in starts]
        source_tokens[source.label] = share * window
    random.Random(f"{config.seed}:order").shuffle(windows)
    ids_NW = torch.tensor(windows, dtype=torch.int64)
    return Windows(ids_NW, _fingerprint(ids_NW), source_tokens, tuple(notes))


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers proportional to ``weights`` that sum to ``total`` (Hamilton's method; ties go to the earlier)."""
    quotas = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def read_source(source: Source, limit: int) -> tuple[str, bool]:
    """The text of a source, its documents joined by blank lines, and whether it was cut at ``limit`` characters.

    Raises InputError as :func:`build_windows` says.
    """
    parts: list[str] = []
    size = 0
    for document in _documents(source, limit):
        if not document.strip():
            continue
        parts.append(document)
        size += len(document) + len(DOCUMENT_JOINT)
        if size > limit:
            break
    text = DOCUMENT_JOINT.join(parts)
    if not text:
        raise InputError(f"calibration source {source.label} has no text", "give a source that is not empty")
    return text[:limit], len(text) > limit


def _documents(source: Source, limit: int) -> Iterator[str]:
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
        if source.kind == "jsonl":
            yield from _jsonl(path, source.field or DEFAULT_FIELD)
        elif source.kind == "parquet":
            yield from _parquet(path, source.field or DEFAULT_FIELD)
        else:
            for file in _text_files(path) if path.is_dir() else [path]:
                with _open_text(file) as stream:
                    yield stream.read(limit + 1)
    except OSError as error:
        raise InputError(
            f"calibration source {path} cannot be read: {error.strerror or error}", "check its permissions"
        ) from error


def _text_files(folder: Path) -> list[Path]:
    """The folder's text files, at any depth, hidden ones left out, in the order of their relative paths."""
    files = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in TEXT_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(
            f"no text files in folder {folder}",
            f"it needs {', '.join(sorted(TEXT_SUFFIXES))} files; name .jsonl and .parquet files one by one",
        )
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason}", "convert it, e.g. with iconv -t utf-8") from error


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with _open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path} line {number} is not valid JSON: {error.msg}", "write one object per line"
                ) from error
            if not isinstance(record, dict):
                raise InputError(f"{path} line {number} is no JSON object", "write one object per line")
            if not isinstance(record.get(field), str):
                raise InputError(
                    f"{path} line {number} has no text field {field!r}",
                    f"its fields are {', '.join(record) or 'none'}; write {path.name}:FIELD",
                )
            yield record[field]


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"reading {path} needs pyarrow", "pip install 'moesaic[parquet]'") from error
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a parquet file", "check the path") from error
    with file:
        names = file.schema_arrow.names
        column = file.schema_arrow.field(field).type if field in names else None
        if column is None or not (pa.types.is_string(column) or pa.types.is_large_string(column)):
            raise InputError(
                f"{path} has no text column {field!r}", f"its columns are {', '.join(names)}; write {path.name}:COLUMN"
            )
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _check_length(source: Source, found: int, window: int, share: int) -> None:
    if found < window and share > 0:
        raise InputError(
            f"calibration source {source.label} has {found} tokens, one window needs {window}",
            "give more text or a smaller --calib-window",
        )
    if found < share * window:
        raise InputError(
            f"calibration source {source.label} has {found} tokens, its share is {share} windows of {window}",
            "give more text, or lower --calib-tokens (tune, distill: --tokens) so that its share is at most "
            f"{found // window * window}",
        )


def _starts(length: int, window: int, count: int, rng: random.Random) -> list[int]:
    """Starts of ``count`` windows in a stream of ``length`` tokens: no overlap, every placement equally likely."""
    free = length - count * window
    return [place + rank * (window - 1) for rank, place in enumerate(sorted(rng.sample(range(free + count), count)))]


def _fingerprint(ids_NW: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(ids_NW.shape)).encode())
    digest.update(ids_NW.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
