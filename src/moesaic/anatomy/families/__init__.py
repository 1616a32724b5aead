"""The families: one file each, named as ``model_type`` in config.json, with a ``FAMILY``.

CONTRIBUTING.md shows how one is added.
"""

from __future__ import annotations

from importlib import import_module

from moesaic.anatomy.base import Family

_DENSE = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
_MOE = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
)

FAMILIES: dict[str, Family] = {name: import_module(f"{__name__}.{name}").FAMILY for name in (*_DENSE, *_MOE)}
"""``model_type`` of config.json -> family."""
