"""The tokenizer of a checkpoint folder. Code that a folder brings along is never run, and nobody is asked about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""A folder without any of these has no tokenizer."""
_TEXT_FREE = "methods that need no text work without it: --method mlpmoe, or random"


def require_tokenizer(folder: Path) -> None:
    """Raise InputError where a folder has no file of a tokenizer. No torch here."""
    if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise InputError(f"there is no tokenizer in {folder}", "copy tokenizer.json and tokenizer_config.json there")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises InputError when there is none, or it cannot be read without code of its own."""
    require_tokenizer(folder)
    from transformers import AutoTokenizer

    from moesaic.nn.register import register

    register()  # where tokenizer_config.json names no class, transformers asks config.json
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        if code := _own_code(folder):
            raise InputError(
                f"the tokenizer in {folder} needs its own code ({code}), which moesaic does not run", _TEXT_FREE
            ) from error
        reason = " ".join(str(error).split())[:120]
        if isinstance(error, ImportError) or not (folder / "tokenizer.json").exists():
            raise InputError(
                f"the tokenizer in {folder} has no tokenizer.json, and cannot be read without: {reason}",
                "add the model's tokenizer.json, or save it with AutoTokenizer where it loads; " + _TEXT_FREE,
            ) from error
        raise InputError(f"no usable tokenizer in {folder}: {reason}", "download it again") from error


def _own_code(folder: Path) -> str | None:
    """The module that tokenizer_config.json names as the tokenizer's code; None where it names none."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["auto_map"]["AutoTokenizer"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    classes = [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
    return f"{classes[0].rpartition('.')[0].rpartition('--')[2]}.py" if classes else None
