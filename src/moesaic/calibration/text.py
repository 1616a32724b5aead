"""From calibration sources to token windows: read, join, tokenise, cut at random places, mix by weight.

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moesaic.calibration.chat import chat_text
from moesaic.calibration.config import CalibrationConfig, Source
from moesaic.calibration.documents import read_documents
from moesaic.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENT_JOINT = "\n\n"

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


class SourceText(NamedTuple):
    """The text of one source, and what the user should know of how it was read."""

    text: str
    notes: tuple[str, ...]


def build_windows(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int | None = None,
    vocabulary: int | None = None,
) -> Windows:
    """Read the sources of ``config`` and cut them into token windows.

    The documents of a source are joined by blank lines into one token stream, no special tokens added. Windows lie at
    random places of it, by the seed, none overlapping another; the sources share them by weight (largest remainder).

    Args:
        config: Sources, number of tokens, window, seed.
        tokenizer: The model's tokenizer.
        max_positions: Longest context of the model; windows are clipped to it.
        vocabulary: Rows of the model's embedding; an id beyond them is refused.

    Raises:
        InputError: A source cannot be read (:func:`moesaic.calibration.documents.read_documents`) or has no text, the
            chat template refuses its messages, the model does not know one of its tokens, or it has fewer tokens than
            its share.
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
        text, found = read_source(source, CHARACTERS_PER_TOKEN * config.tokens, tokenizer)
        notes += found
        if share == 0:
            notes.append(f"calibration source {source.label} is too light for a window; raise the number of tokens")
        ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        _check_length(source, len(ids), window, share)
        starts = _starts(len(ids), window, share, random.Random(f"{config.seed}:{index}"))
        windows += [ids[start : start + window] for start in starts]
        source_tokens[source.label] = share * window
    random.Random(f"{config.seed}:order").shuffle(windows)
    ids_NW = torch.tensor(windows, dtype=torch.int64)
    check_ids(ids_NW, tokenizer, vocabulary)
    return Windows(ids_NW, _fingerprint(ids_NW), source_tokens, tuple(notes))


def check_ids(ids: Tensor, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> None:
    """Refuse ids without a row in the model's embedding, as a tokenizer with added tokens gives them.

    Raises InputError, naming the token.
    """
    if vocabulary is not None and ids.numel() and int(ids.max()) >= vocabulary:
        worst = int(ids.max())
        raise InputError(
            f"the tokenizer writes token {worst}, {tokenizer.convert_ids_to_tokens(worst)!r}, but the model has "
            f"only {vocabulary}",
            "put the model's own tokenizer there, or resize the model: resize_token_embeddings(len(tokenizer))",
        )


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers proportional to ``weights`` that sum to ``total`` (Hamilton's method; ties go to the earlier)."""
    quotas = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def read_source(source: Source, limit: int, tokenizer: PreTrainedTokenizerBase) -> SourceText:
    """The text of a source, its documents joined by blank lines, cut at ``limit`` characters.

    Raises InputError as :func:`build_windows` says.
    """
    parts: list[str] = []
    size, chats = 0, False
    for document in read_documents(source, limit):
        if not isinstance(document, str):
            chats = True
            document = chat_text(document, tokenizer)
        if not document.strip():
            continue
        parts.append(document)
        size += len(document) + len(DOCUMENT_JOINT)
        if size > limit:
            break
    text = DOCUMENT_JOINT.join(parts)
    if not text:
        raise InputError(f"calibration source {source.label} has no text", "give a source that is not empty")
    whole = _without_surrogates(text[:limit])
    notes = []
    if len(text) > limit and not source.builtin:
        notes.append(f"only its first {limit:,} characters are used")
    if chats and not tokenizer.chat_template:
        notes.append("the model has no chat template, so that its messages are joined by blank lines")
    if whole != text[:limit]:
        notes.append("half characters (lone surrogates) in it are replaced by U+FFFD")
    return SourceText(whole, tuple(f"calibration source {source.label}: {note}" for note in notes))


def _without_surrogates(text: str) -> str:
    """JSON can spell half a character, ``\\ud83d``, which no tokenizer takes; both halves side by side are one."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


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
