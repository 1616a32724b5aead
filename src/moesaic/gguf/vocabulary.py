"""The tokenizer inside a GGUF: copied from another GGUF of the same model, or built from ``tokenizer.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, TokenType
from tokenizers import Tokenizer

from moesaic.errors import CheckpointError, InputError, UnsupportedModelError
from moesaic.gguf.file import Field, field
from moesaic.gguf.pretokenizers import pretokenizer_name
from moesaic.gguf.tokenizer_parts import COPY_HINT, adds_space_prefix, check_parts, is_sentencepiece

_TOKENS, _TYPES, _SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"
_FILLERS = {_TYPES: int(TokenType.UNUSED), _SCORES: -1e4}
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_NO_MERGE = -1e4
"""Score of a piece that no merge makes: behind all others."""


def copied_vocabulary(gguf: Path, vocabulary: int) -> dict[str, Field]:
    """All ``tokenizer.*`` metadata of a GGUF, filled up to ``vocabulary`` tokens.

    Raises InputError when it is no GGUF, has no tokenizer, or has more tokens than the model has embeddings.
    """
    try:
        reader = GGUFReader(gguf)
    except (OSError, ValueError) as error:
        raise InputError(f"{gguf} cannot be read as a GGUF: {error}", "give the GGUF of the dense model") from error
    fields = {key: entry for key, entry in reader.fields.items() if key.startswith("tokenizer.")}
    if _TOKENS not in fields:
        raise InputError(f"{gguf} has no tokenizer", "give the GGUF of the dense model")
    metadata = {}
    for key, entry in fields.items():
        item = entry.types[-1] if entry.types[0] == GGUFValueType.ARRAY else None
        metadata[key] = Field(entry.contents(), entry.types[0], item)
    count = len(metadata[_TOKENS].value)
    _check_count(count, vocabulary, str(gguf))
    metadata[_TOKENS].value.extend(_padding(count, vocabulary))
    for key, filler in _FILLERS.items():
        if key in metadata:
            metadata[key].value.extend([filler] * (vocabulary - count))
    return metadata


def built_vocabulary(folder: Path, config: dict[str, Any], vocabulary: int) -> dict[str, Field]:
    """``tokenizer.*`` metadata from a folder's ``tokenizer.json``, special tokens and chat template included.

    Raises:
        InputError: there is no tokenizer.json.
        CheckpointError: it cannot be read.
        UnsupportedModelError: llama.cpp has no such tokenizer, as far as known here, or leaves out a part of it.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json",
            "save it there with transformers' AutoTokenizer, or give a GGUF of the dense model to copy it from",
        )
    tokenizer = read_tokenizer(path)
    content = content_of(tokenizer)
    settings_path = folder / "tokenizer_config.json"
    settings = _read_json(settings_path) if settings_path.is_file() else {}
    model, added = content["model"], content.get("added_tokens", [])
    if model["type"] != "BPE":
        raise UnsupportedModelError(f"a {model['type']} tokenizer: only BPE ones are written", COPY_HINT)
    check_parts(content, settings)
    tokens, types = _tokens(model, added, vocabulary, str(path))
    metadata = {_TOKENS: field(tokens), _TYPES: field(types)}
    if is_sentencepiece(content):
        metadata |= {
            "tokenizer.ggml.model": field("llama"),
            "tokenizer.ggml.pre": field("default"),
            _SCORES: field(_scores(model, tokens)),
            "tokenizer.ggml.add_space_prefix": field(adds_space_prefix(content)),
        }
    else:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        metadata |= {
            "tokenizer.ggml.model": field("gpt2"),
            "tokenizer.ggml.pre": field(pretokenizer_name(content)),
            "tokenizer.ggml.add_space_prefix": field(False),
        }
        if merges:
            metadata["tokenizer.ggml.merges"] = field(merges)
    ids = _special_ids(config, settings, tokens)
    metadata |= {f"tokenizer.ggml.{_SPECIAL[name]}_token_id": field(index) for name, index in ids.items()}
    return metadata | _ends(tokenizer, ids) | _chat_template(folder, settings)


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, which encodes whole texts: cutting and padding that it asks for are off.

    Raises CheckpointError when the library cannot read it.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path} is no tokenizer that can be read: {reason}", "copy it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def content_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Its tokenizer.json as the library writes it today."""
    return json.loads(tokenizer.to_str())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}", "copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object", "copy it again")
    return content


def _tokens(
    model: dict[str, Any], added: list[dict[str, Any]], vocabulary: int, source: str
) -> tuple[list[str], list[int]]:
    pieces = {index: (piece, _piece_type(model, piece)) for piece, index in model["vocab"].items()}
    for token in added:
        kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        if pieces.get(token["id"], ("", kind))[1] != TokenType.UNKNOWN:
            pieces[token["id"]] = (token["content"], kind)
    _check_count(max(pieces) + 1, vocabulary, source)
    filler = _padding(0, vocabulary)
    listed = [pieces.get(index, (filler[index], TokenType.UNUSED)) for index in range(vocabulary)]
    return [piece for piece, _ in listed], [int(kind) for _, kind in listed]


def _piece_type(model: dict[str, Any], piece: str) -> TokenType:
    if piece == model.get("unk_token"):
        return TokenType.UNKNOWN
    is_byte = model.get("byte_fallback") and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """A score per token that ranks pieces as the merges do: minus the place of the first merge that makes one."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        first.setdefault(left + right, rank)
    return [-float(first[token]) if token in first else _NO_MERGE for token in tokens]


def _special_ids(config: dict[str, Any], settings: dict[str, Any], tokens: list[str]) -> dict[str, int]:
    """Ids of bos, eos, unk and pad, as far as there are such tokens: -1, the null of some configs, is none."""
    ids: dict[str, int] = {}
    for name in _SPECIAL:
        stated = settings.get(f"{name}_token")
        text = stated.get("content") if isinstance(stated, dict) else stated
        if text in tokens:
            ids[name] = tokens.index(text)
            continue
        listed = config.get(f"{name}_token_id")
        first = next((index for index in (listed if isinstance(listed, list) else [listed])), None)
        if isinstance(first, int) and 0 <= first < len(tokens):
            ids[name] = first
    return ids


def _ends(tokenizer: Tokenizer, ids: dict[str, int]) -> dict[str, Field]:
    """Whether a text gets bos in front and eos behind. Raises UnsupportedModelError where it gets anything else."""
    bare, encoded = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    for bos, eos in ((False, False), (True, False), (False, True), (True, True)):
        if encoded == [*([ids.get("bos")] if bos else []), *bare, *([ids.get("eos")] if eos else [])]:
            return {"tokenizer.ggml.add_bos_token": field(bos), "tokenizer.ggml.add_eos_token": field(eos)}
    shown = " ".join(tokenizer.id_to_token(index) or "?" for index in encoded)
    raise UnsupportedModelError(
        f"the tokenizer's post-processor makes {shown!r} of 'a': llama.cpp adds bos and eos alone", COPY_HINT
    )


def _chat_template(folder: Path, settings: dict[str, Any]) -> dict[str, Field]:
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return {"tokenizer.chat_template": field(template)} if template else {}


def _check_count(count: int, vocabulary: int, source: str) -> None:
    if count > vocabulary:
        raise InputError(
            f"{source} has {count} tokens, the model {vocabulary} embeddings", "is it the tokenizer of this model?"
        )


def _padding(start: int, end: int) -> list[str]:
    """Names for embeddings that no token has."""
    return [f"[PAD{index}]" for index in range(start, end)]
