"""The ``moesaic`` architecture: every blueprint fits; transformers loads it after ``import moesaic`` or with ``trust_remote_code``.

The folder holds the dense family's tensors under their own names, the FFNs packed as [shared; expert 0; ...] with their routers, and
one modelling file that needs nothing but torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.anatomy.base import Anatomy

MODELLING_FILE = "modeling_moesaic.py"
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype")


def config_json(
    anatomy: Anatomy, dense_config: Mapping[str, Any], specs: Mapping[str, Mapping[str, Any]], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json of the converted model.

    Args:
        anatomy: Of the dense model.
        dense_config: Its config.json, kept verbatim as ``text_config``.
        specs: Per FFN module path, what the runtime must know (``LayerPlan.spec``).
        provenance: The ``moesaic`` block: version, method, config, source and blueprint digests.
    """
    return {
        "architectures": ["MoesaicForCausalLM"],
        "model_type": "moesaic",
        "auto_map": {
            "AutoConfig": "modeling_moesaic.MoesaicConfig",
            "AutoModelForCausalLM": "modeling_moesaic.MoesaicForCausalLM",
        },
        "text_config": dict(dense_config),
        "ffn_sites": {path: dict(spec) for path, spec in specs.items()},
        "ffn_bypass": list(anatomy.family.bypass),
        "moesaic": dict(provenance),
    } | {key: dense_config[key] for key in _CARRIED if key in dense_config}


def modelling_source() -> str:
    """Text of the modelling file that travels with the checkpoint."""
    return (Path(__file__).parent.parent / "nn" / MODELLING_FILE).read_text(encoding="utf-8")
