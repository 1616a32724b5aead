"""Does llama.cpp make the same tokens of a text as the folder's tokenizer.json? Asked of texts where tokenizers differ.

The parts of a tokenizer that llama.cpp leaves out are refused by name before anything is written
(:mod:`moesaic.gguf.tokenizer_parts`). This is for what is not known there.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.errors import VerificationError
from moesaic.evaluate.llama_cpp import LlamaCpp
from moesaic.gguf.tokenizer_parts import COPY_HINT, composes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ODD_TEXTS = (
    "The Other one's HTTPServer, it's DON'T 3.14e-10 a/b/c?!... (x) [y] {z} <q> #tag @me $5 50% a_b-c",
    " one space before",
    "   three   before   and   after   ",
    "Tab\tthe\n\nend\r\n x \n\n\n y\n",
    "\n",
    "1234567 8 1 22 333 4444 0x1F",
    "caf\u00e9 na\u00efve \u00fcber \u00c5ngstr\u00f6m \u0130stanbul stra\u00dfe \ufb01n",
    "cafe\u0301 e\u0301",
    "\u4e2d\u6587 the \u5317\u4eac 2024\u5e74 \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "a\u00a0b\u2009c\u3000d \u00bd \u2167 \u00b2 \u2581 a\u2581b",
    "\u201cquoted\u201d \u2018s \u2014 \u2026 \u20ac",
)
_ADDED = 64
"""Added tokens that are asked for, each among words and side by side."""


def check_tokens(gguf: Path, folder: Path) -> None:
    """Raise VerificationError, with the first text, where tokens differ; or when llama.cpp cannot run the file."""
    from moesaic.gguf.vocabulary import read_tokenizer

    tokenizer = read_tokenizer(folder / "tokenizer.json")
    with LlamaCpp(gguf) as engine:
        for text in _texts(tokenizer):
            for special in (False, True):
                expected = tokenizer.encode(text, add_special_tokens=special).ids
                found = engine.tokenize(text, special=special)
                if found != expected:
                    raise VerificationError(
                        f"llama.cpp makes other tokens of {text[:60]!r}: {_around(expected, found)}", COPY_HINT
                    )


def _texts(tokenizer: Tokenizer) -> list[str]:
    """The odd texts, but those that NFC changes where the tokenizer composes characters; and its added tokens."""
    from moesaic.gguf.vocabulary import content_of

    texts = [
        text for text in ODD_TEXTS if unicodedata.is_normalized("NFC", text) or not composes(content_of(tokenizer))
    ]
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()][:_ADDED]
    return texts + [f"the{token}in {token} on{token}{token}" for token in added]


def _around(expected: list[int], found: list[int]) -> str:
    """Both, from where they part."""
    same = next((at for at, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), 0)
    return f"{found[same : same + 6]} in place of {expected[same : same + 6]}"
