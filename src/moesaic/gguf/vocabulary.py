"""The tokenizer inside a GGUF: copied from another GGUF of the same model, or built from ``tokenizer.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, TokenType

from moesaic.errors import CheckpointError, InputError, UnsupportedModelError
from moesaic.gguf.file import Field, field
from moesaic.gguf.pretokenizers import adds_space_prefix, is_sentencepiece, pretokenizer_name

_TOKENS, _TYPES, _SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"
_FILLERS = {_TYPES: int(TokenType.UNUSED), _SCORES: -1e4}
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
        UnsupportedModelError: llama.cpp has no such tokenizer, as far as known here.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json",
            "save it there with transformers' AutoTokenizer, or give a GGUF of the dense model to copy it from",
        )
    content = _read_json(path)
    settings_path = folder / "tokenizer_config.json"
    settings = _read_json(settings_path) if settings_path.is_file() else {}
    model, added = content["model"], content.get("added_tokens", [])
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"a {model.get('type')} tokenizer: only BPE ones are written", "copy it from a GGUF"
        )
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
    return metadata | _special_tokens(path, config, settings, tokens) | _chat_template(folder, settings)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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


def _special_tokens(
    path: Path, config: dict[str, Any], settings: dict[str, Any], tokens: list[str]
) -> dict[str, Field]:
    from tokenizers import Tokenizer

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids: dict[str, int] = {}
    for name in names:
        stated = settings.get(f"{name}_token")
        text = stated.get("content") if isinstance(stated, dict) else stated
        if text in tokens:
            ids[name] = tokens.index(text)
        elif (fallback := _first(config.get(f"{name}_token_id"))) is not None:
            ids[name] = fallback
    encoded = Tokenizer.from_file(str(path)).encode("a").ids
    return {f"tokenizer.ggml.{names[name]}_token_id": field(index) for name, index in ids.items()} | {
        "tokenizer.ggml.add_bos_token": field(len(encoded) > 1 and encoded[0] == ids.get("bos")),
        "tokenizer.ggml.add_eos_token": field(len(encoded) > 1 and encoded[-1] == ids.get("eos")),
    }


def _first(ids: Any) -> int | None:
    return (ids[0] if ids else None) if isinstance(ids, list) else ids


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
