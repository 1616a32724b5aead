"""The families: one file each, named as ``model_type`` in config.json, with a ``FAMILY``.

CONTRIBUTING.md shows how one is added.
"""

from __future__ import annotations

from importlib import import_module

from moesaic.anatomy.base import Family

_DENSE = (
    "apertus",
    "arcee",
    "cohere",
    "cohere2",
    "cwm",
    "diffllama",
    "ernie4_5",
    "exaone4",
    "falcon",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gptj",
    "granite",
    "helium",
    "hunyuan_v1_dense",
    "hyperclovax",
    "lfm2",
    "llama",
    "minicpm3",
    "ministral",
    "ministral3",
    "mistral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "vaultgemma",
    "youtu",
)
_MOE = (
    "afmoe",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "jamba",
    "laguna",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "solar_open",
)

FAMILIES: dict[str, Family] = {name: import_module(f"{__name__}.{name}").FAMILY for name in (*_DENSE, *_MOE)}
"""``model_type`` of config.json -> family."""
