"""What goes along with the weights of a checkpoint: tokenizer, processor, generation settings, chat templates, licence.

The one list of it: every verb that writes a folder copies these files byte for byte, and a hub id fetches them.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

PROCESSORS = "*processor_config.json"
"""How images and sound become inputs. A text model has no use for it."""
SIDE_PATTERNS = (
    "tokenizer*",
    "*vocab*",
    "*merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.spm",
    "*.bpe",
    "*.tiktoken",
    "*.tokenizer",
    "bpe.codes",
    "dict.txt",
    "encoder.json",
    "normalizer.json",
    "emoji.json",
    "byte_maps.json",
    "tekken.json",
    PROCESSORS,
    "generation_config.json",
    "configuration.json",
    "*chat_template*",
    "*.jinja",
    "*LICEN[CS]E*",
    "*[Ll]icen[cs]e*",
    "*NOTICE*",
    "[Nn]otice*",
    "COPYING*",
    "COPYRIGHT*",
    "*USE_POLICY*",
)
"""Names in the folder itself. A list of what is wanted: a folder may hold optimiser states and worse."""

SIDE_FOLDERS = ("additional_chat_templates", "custom_generate")
"""Folders that are taken with all that is in them, as transformers reads them."""

_MAPPED = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_LONGEST = 250
"""Bytes of a module's name: a longer one is no file's, and asking for it an error."""
_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.\s*(?:import\s+)?(\w+)", re.MULTILINE)


def side_files(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files to copy beside converted weights, sorted by path; links count as what they point to.

    Code is among them where the folder's own files name it (``auto_map``), with what it imports: a tokenizer of its own
    is of no use without. Nothing here runs it.

    Args:
        folder: The checkpoint.
        config: Its config.json, or of the ``moesaic`` architecture that of the dense model in it.
    """
    named = [
        file
        for file in folder.iterdir()
        if file.is_file() and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in SIDE_PATTERNS)
    ]
    inside = [
        file
        for name in SIDE_FOLDERS
        for file in (folder / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    ]
    return sorted({*named, *inside, *_code(folder, config)})


def _code(folder: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """The Python files that the folder's configs name, and those that they import from beside themselves."""
    waiting = {
        name for content in (config, *map(_read, (folder / name for name in _MAPPED))) for name in _mapped(content)
    }
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        file = folder / f"{name}.py"
        if len(name.encode(errors="surrogatepass")) <= _LONGEST and file.is_file():
            yield file
            waiting |= set(_IMPORT.findall(file.read_text(encoding="utf-8", errors="replace"))) - seen


def _mapped(config: Mapping[str, Any]) -> Iterator[str]:
    """Modules that ``auto_map`` names in this folder; ``owner/model--module.Class`` is in another."""
    auto_map = config.get("auto_map")
    for entry in auto_map.values() if isinstance(auto_map, Mapping) else ():
        classes: Iterable[Any] = entry if isinstance(entry, list) else (entry,)
        for name in classes:
            if isinstance(name, str) and "." in name and not {"/", "\\"} & set(name):
                yield name.partition(".")[0]


def _read(file: Path) -> Mapping[str, Any]:
    """A JSON object; {} where there is none: what is wrong with it shows when it is used."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
