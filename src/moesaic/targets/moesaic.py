"""The ``moesaic`` architecture: every blueprint fits; transformers loads it after ``import moesaic`` or with
``trust_remote_code``.

The folder holds the dense family's tensors under their own names, the FFNs packed as [shared; expert 0; ...] with their
routers, pruned attention with its masks, and modelling files that need nothing but torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.anatomy.attention import pruning_reasons
from moesaic.targets.base import Packed, Split, TargetOptions

if TYPE_CHECKING:
    from torch import Tensor

MODELLING_FILES = (
    "modeling_moesaic.py",
    "moesaic_attention.py",
    "moesaic_ffn.py",
    "moesaic_routing.py",
    "moesaic_union.py",
)
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype")


def reasons(split: Split) -> list[str]:
    """See :class:`TargetModule`."""
    return pruning_reasons(split.anatomy, split.attention)[:1]


def exact(split: Split, options: TargetOptions) -> bool:
    """See :class:`TargetModule`."""
    return True


def factor(split: Split, options: TargetOptions) -> int:
    """See :class:`TargetModule`."""
    return 1


def config_json(split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
    """See :class:`TargetModule`. The dense config stands verbatim in ``text_config``."""
    dense = split.anatomy.config
    attention = {path: plan.spec() for path, plan in split.attention.items()}
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
        **({"attention_sites": attention} if attention else {}),
        "moesaic": dict(provenance),
    } | {key: dense[key] for key in _CARRIED if key in dense}


def layer_tensors(
    split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
) -> dict[str, Tensor]:
    """See :class:`TargetModule`."""
    from moesaic.materialise.attention import pack_attention

    tensors = {f"{path}.{name}": tensor for path, ffn in packed.items() for name, tensor in ffn.items()} | dict(copied)
    for path, plan in split.attention.items():
        if path.startswith(f"{split.anatomy.layer_path(layer)}."):
            tensors |= pack_attention(copied, path, plan)
    return tensors


def rest_tensors(split: Split, copied: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """See :class:`TargetModule`."""
    return dict(copied)


def files() -> dict[str, str]:
    """See :class:`TargetModule`. The modelling files."""
    folder = Path(__file__).parent.parent / "nn"
    return {name: (folder / name).read_text(encoding="utf-8") for name in MODELLING_FILES}
