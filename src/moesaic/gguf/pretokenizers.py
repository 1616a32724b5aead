"""How a ``tokenizer.json`` splits text before merging, and llama.cpp's name for it.

llama.cpp has these splits compiled in and the file only names one, so a split that is not known here is refused:
another one would load and tokenise some texts differently.
"""

from __future__ import annotations

from typing import Any

from moesaic.errors import UnsupportedModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_WORD = rf"{_LEAD}\p{{L}}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BYTES = ("ByteLevel", True)
_BYTES_ONLY = ("ByteLevel", False)

_QWEN2 = ("Split", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_TAIL}")
_LLAMA3 = ("Split", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}")
_TEKKEN = (
    "Split",
    rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
)
# (steps, merges are skipped for words that are tokens) -> name; None where llama.cpp does not care.
_NAMES: list[tuple[tuple[Any, ...], bool | None, str]] = [
    ((_BYTES,), False, "gpt-2"),
    ((("Digits", True), _BYTES), False, "smollm"),
    ((_QWEN2, _BYTES_ONLY), False, "qwen2"),
    ((_LLAMA3, _BYTES_ONLY), True, "llama-bpe"),
    ((_LLAMA3, _BYTES_ONLY), False, "dbrx"),
    ((_TEKKEN, _BYTES_ONLY), None, "tekken"),
]


def pretokenizer_name(content: dict[str, Any]) -> str:
    """llama.cpp's name for the split in a parsed ``tokenizer.json`` with byte-level BPE.

    Raises UnsupportedModelError when it is not one of those known here.
    """
    steps = tuple(_step(step) for step in _flat(content.get("pre_tokenizer")))
    skips_merges = bool(content["model"].get("ignore_merges"))
    for known, skips, name in _NAMES:
        if steps == known and skips in (None, skips_merges):
            return name
    raise UnsupportedModelError(
        f"the tokenizer splits text in a way that is not known here ({', '.join(str(step[0]) for step in steps)})",
        "give a GGUF of the dense model to copy the tokenizer from",
    )


def is_sentencepiece(content: dict[str, Any]) -> bool:
    """Whether a BPE is one made by SentencePiece: characters it lacks become bytes."""
    return bool(content["model"].get("byte_fallback"))


def adds_space_prefix(content: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the text."""
    normalizers = [step["type"] for step in _flat(content.get("normalizer"))]
    schemes = [step.get("prepend_scheme", "always") for step in _flat(content.get("pre_tokenizer"))]
    return "Prepend" in normalizers or any(scheme in ("always", "first") for scheme in schemes)


def _flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for inner in step.get("pretokenizers") or step.get("normalizers") or [] for part in _flat(inner)]
    return [step]


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return (kind, step.get("use_regex", True))
    if kind == "Digits":
        return (kind, step.get("individual_digits"))
    if kind == "Split" and step.get("behavior") in ("Isolated", "Removed") and "Regex" in step.get("pattern", {}):
        # "Removed" and inverted keeps the matches: the same as isolating them, for patterns that match everything.
        return (kind, step["pattern"]["Regex"])
    return (f"{kind} with options",)
