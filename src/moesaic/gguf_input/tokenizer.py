"""The tokenizer of a GGUF as transformers builds it, put right where transformers reads past what the file says."""

from __future__ import annotations

import json
from typing import Any

from moesaic.errors import InputError, UnsupportedModelError
from moesaic.gguf_input.header import Header

# llama.cpp's names of splits (src/llama-vocab.cpp): by GPT-2's expression alone, and with every digit by itself before.
# fmt: off
_GPT2 = frozenset({"default", "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de",
                   "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion"})
_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
# fmt: on


def read_tokenizer(header: Header) -> Any:
    """transformers' fast tokenizer of a GGUF.

    transformers reads no splitting of digits and no ``add_space_prefix``, and splits what it does not know as GPT-2
    does: the first two are set here, the last is refused.

    Raises:
        UnsupportedModelError: transformers has no such tokenizer.
        InputError: a package is missing.
    """
    from transformers import PreTrainedTokenizerFast

    file = header.file
    try:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(file.parent), gguf_file=file.name)
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"reading the tokenizer of {file} needs another package: {reason}", "install it") from error
    except Exception as error:  # whatever its reader stumbles over
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"{file}: transformers cannot read its tokenizer: {reason}",
            "convert the original checkpoint in place of the GGUF",
        ) from error
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        _set_split(tokenizer, header)
    elif header.metadata.get("tokenizer.ggml.add_space_prefix") is False:
        _drop_space_prefix(tokenizer)
    return tokenizer


def _set_split(tokenizer: Any, header: Header) -> None:
    from tokenizers import pre_tokenizers

    name = str(header.metadata.get("tokenizer.ggml.pre") or "default")
    backend = tokenizer.backend_tokenizer
    if name in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif name not in _GPT2 and "Split" not in str(json.loads(backend.to_str())["pre_tokenizer"]):
        raise UnsupportedModelError(
            f"{header.file}: its tokenizer splits text as {name!r} (tokenizer.ggml.pre), which transformers does not "
            "read from a GGUF",
            "convert the original checkpoint in place of the GGUF",
        )


def _drop_space_prefix(tokenizer: Any) -> None:
    """No space before the text: neither by Metaspace nor by a normalizer."""
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for step in _steps(content["pre_tokenizer"], "pretokenizers") + _steps(content["decoder"], "decoders"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    normalizers = [step for step in _steps(content["normalizer"], "normalizers") if step["type"] != "Prepend"]
    content["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    if content["decoder"] and content["decoder"]["type"] == "Sequence":  # which would take the space away again
        content["decoder"]["decoders"] = [step for step in content["decoder"]["decoders"] if step["type"] != "Strip"]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]
