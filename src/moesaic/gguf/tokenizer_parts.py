"""What llama.cpp does with a tokenizer's parts: those that it would leave out are refused by name.

llama.cpp knows merges, one of its own splits by name, tokens that are matched as they stand, and one token before and
one after a text. It reads no normalizer, no other post-processor, and no flags of added tokens; it gives such flags to
some models by their name (``load_vocab`` in its ``llama-vocab.cpp``).

``content`` is a ``tokenizer.json`` as the library writes it, so that older spellings of a part do not occur.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moesaic.errors import UnsupportedModelError

COPY_HINT = "to take llama.cpp's version of it, give a GGUF of the dense model with --tokenizer-gguf"
_SPACE = "▁"
_FLAGS = {
    "single_word": "matches whole words only",
    "lstrip": "takes the spaces before it",
    "rstrip": "takes the spaces after it",
}


def flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, sequences opened."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for inner in step.get("pretokenizers") or step.get("normalizers") or [] for part in flat(inner)]
    return [step]


def is_sentencepiece(content: dict[str, Any]) -> bool:
    """Whether a BPE is one made by SentencePiece: characters it lacks become bytes."""
    return bool(content["model"].get("byte_fallback"))


def adds_space_prefix(content: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the text; one that :func:`check_parts` accepted."""
    return any(step["type"] == "Prepend" for step in flat(content.get("normalizer")))


def composes(content: dict[str, Any]) -> bool:
    """Whether the normalizer does nothing but compose characters (NFC), which nearly all texts are already."""
    return [step["type"] for step in flat(content.get("normalizer"))] == ["NFC"]


def check_parts(content: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse a BPE tokenizer of which llama.cpp would apply only a part.

    NFC passes: it changes only texts in decomposed form, and models such as Qwen2 have it.

    Args:
        content: The parsed tokenizer.json.
        settings: The parsed tokenizer_config.json.

    Raises UnsupportedModelError, which names the parts.
    """
    check = _sentencepiece_reasons if is_sentencepiece(content) else _byte_level_reasons
    reasons = [*check(content, settings), *_model_reasons(content["model"]), *_added_reasons(content)]
    if settings.get("split_special_tokens"):
        reasons.append("split_special_tokens of tokenizer_config.json")
    if reasons:
        raise UnsupportedModelError(
            f"llama.cpp would leave out parts of the tokenizer: {'; '.join(reasons)}", COPY_HINT
        )


def _byte_level_reasons(content: dict[str, Any], settings: dict[str, Any]) -> Iterable[str]:
    for step in flat(content.get("normalizer")):
        if step["type"] != "NFC":
            yield f"the normalizer {step['type']}"
    if settings.get("add_prefix_space"):
        yield "add_prefix_space of tokenizer_config.json"


def _sentencepiece_reasons(content: dict[str, Any], settings: dict[str, Any]) -> Iterable[str]:
    spaces = prefix = False
    for step in flat(content.get("normalizer")):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, _SPACE):
            spaces = True
        else:
            yield f"the normalizer {step['type']}"
    for step in flat(content.get("pre_tokenizer")):
        if step["type"] != "Metaspace" or step["replacement"] != _SPACE or step.get("split", True):
            yield f"the pre-tokenizer {step['type']}"
        elif not prefix and step["prepend_scheme"] != "never":
            # llama.cpp also puts one before a text that begins with a space, and after every special token.
            yield f"the pre-tokenizer Metaspace, which puts a space before a text ({step['prepend_scheme']})"
        else:
            spaces = True
    if not spaces:
        yield f"no part of it makes {_SPACE} of a space, which llama.cpp always does"
    if content["model"].get("ignore_merges"):
        yield "ignore_merges of the model"
    missing = [value for value in range(256) if f"<0x{value:02X}>" not in content["model"]["vocab"]]
    if missing:
        yield f"the vocabulary lacks {len(missing)} of the 256 bytes"


def _model_reasons(model: dict[str, Any]) -> Iterable[str]:
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            yield f"{name} of the model"


def _added_reasons(content: dict[str, Any]) -> Iterable[str]:
    rewrites = bool(flat(content.get("normalizer"))) and not composes(content)
    for flag, effect in (*_FLAGS.items(), ("normalized", "is matched in normalised text")):
        found = [token["content"] for token in content.get("added_tokens", []) if token.get(flag)]
        if found and (rewrites or flag != "normalized"):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            yield f"the added token {found[0]!r}{more} {effect} ({flag})"
