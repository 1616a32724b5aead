"""How a ``tokenizer.json`` splits text before merging, and llama.cpp's name for it.

llama.cpp has these splits compiled in and the file only names one, so a split that is not known here is refused:
another one would load and tokenise some texts differently.
"""

from __future__ import annotations

from typing import Any

from moesaic.errors import UnsupportedModelError
from moesaic.gguf.tokenizer_parts import COPY_HINT, flat

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
    steps = tuple(_step(step) for step in flat(content.get("pre_tokenizer")))
    skips_merges = bool(content["model"].get("ignore_merges"))
    for known, skips, name in _NAMES:
        if steps == known and skips in (None, skips_merges):
            return name
    raise UnsupportedModelError(
        f"the tokenizer splits text in a way that is not known here ({', '.join(str(step[0]) for step in steps)})",
        COPY_HINT,
    )


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    kind = step["type"]
    if kind == "ByteLevel":
        return ("ByteLevel with add_prefix_space",) if step.get("add_prefix_space") else (kind, step["use_regex"])
    if kind == "Digits":
        return (kind, step.get("individual_digits"))
    # "Removed" and inverted keeps the matches: the same as isolating them, for patterns that match everything.
    isolates = (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
    if kind == "Split" and isolates and "Regex" in step.get("pattern", {}):
        return (kind, step["pattern"]["Regex"])
    return (f"{kind} with options",)
