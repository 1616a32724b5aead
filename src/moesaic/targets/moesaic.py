"""The ``moesaic`` architecture: every blueprint fits; transformers loads it after ``import moesaic`` or with
``trust_remote_code``.

The folder holds the dense family's tensors under their own names, the FFNs packed as [shared; expert 0; ...] with their
routers, and one modelling file that needs nothing but torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.targets.base import Packed, Split, TargetOptions

if TYPE_CHECKING:
    from torch import Tensor

MODELLING_FILE = "modeling_moesaic.py"
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype")


def reasons(split: Split) -> list[str]:
    """See :class:`TargetModule`."""
    return []


def exact(split: Split, options: TargetOptions) -> bool:
    """See :class:`TargetModule`."""
    return True


def config_json(split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
    """See :class:`TargetModule`. The dense config stands verbatim in ``text_config``."""
    dense = split.anatomy.config
    return {
        "architectures": ["MoesaicForCausalLM"],
        "model_type": "moesaic",
        "auto_map": {
            "AutoConfig": "modeling_moesaic.MoesaicConfig",
            "AutoModelForCausalLM": "modeling_moesaic.MoesaicForCausalLM",
        },
        "text_config": dict(dense),
        "ffn_sites": {path: dict(spec) for path, spec in split.specs.items()},
        "ffn_bypass": list(split.anatomy.family.bypass),
        "moesaic": dict(provenance),
    } | {key: dense[key] for key in _CARRIED if key in dense}


def layer_tensors(
    split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
) -> dict[str, Tensor]:
    """See :class:`TargetModule`."""
    return {f"{path}.{name}": tensor for path, ffn in packed.items() for name, tensor in ffn.items()} | dict(copied)


def rest_tensors(split: Split, copied: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """See :class:`TargetModule`."""
    return dict(copied)


def files() -> dict[str, str]:
    """See :class:`TargetModule`. The modelling file."""
    source = Path(__file__).parent.parent / "nn" / MODELLING_FILE
    return {MODELLING_FILE: source.read_text(encoding="utf-8")}
