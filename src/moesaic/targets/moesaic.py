"""The ``moesaic`` architecture: every blueprint fits; transformers loads it after ``moesaic.register()`` or
with ``trust_remote_code``.

The folder holds the dense family's tensors under their own names, the FFNs packed as [shared; expert 0; ...] with their
routers, pruned attention with its masks, and modelling files that need nothing but torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesaic.anatomy.attention import pruning_reasons
from moesaic.anatomy.wrappers import WHOLE_CONFIG
from moesaic.blueprint.shape import FFNShape
from moesaic.targets.base import Packed, Split, Target, TargetOptions

if TYPE_CHECKING:
    from torch import Tensor

_RUNTIME = Path(__file__).parent.parent / "nn"
MODELLING_FILES = ("modeling_moesaic.py", *sorted(path.name for path in _RUNTIME.glob("moesaic_*.py")))
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype")


class Moesaic(Target):
    """See the file's own text."""

    @property
    def freedom(self) -> Literal["widths"]:
        """Layers may differ in all."""
        return "widths"

    def split_reasons(self, split: Split) -> list[str]:
        """See :class:`Target`."""
        if split.whole is not None and split.attention:
            return [f"the attention is pruned, which it cannot be inside a {split.whole.model_type} model"]
        return pruning_reasons(split.anatomy, split.attention)[:1]

    def stored(self, shape: FFNShape, split: Split, options: TargetOptions) -> tuple[int, int]:
        """See :class:`Target`."""
        return shape.neurons, shape.router_rows(gated=split.anatomy.gated)

    def config_json(self, split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
        """See :class:`Target`. The dense config stands verbatim in ``text_config``."""
        dense = split.anatomy.config
        attention = {path: plan.spec() for path, plan in split.attention.items()}
        auto, kind = ("AutoModelForCausalLM", "MoesaicForCausalLM")
        if split.whole is not None:
            auto, kind = ("AutoModelForImageTextToText", "MoesaicForImageTextToText")
        return {
            "architectures": [kind],
            "model_type": "moesaic",
            "auto_map": {"AutoConfig": "modeling_moesaic.MoesaicConfig", auto: f"modeling_moesaic.{kind}"},
            "text_config": dict(dense),
            **({} if split.whole is None else {WHOLE_CONFIG: dict(split.whole.config)}),
            "ffn_sites": {path: dict(spec) for path, spec in split.specs.items()},
            "ffn_bypass": list(split.anatomy.family.bypass),
            **({"attention_sites": attention} if attention else {}),
            **({"ffn_activation": split.anatomy.activation} if split.anatomy.family.activation is None else {}),
            "moesaic": dict(provenance),
        } | {key: dense[key] for key in _CARRIED if key in dense}

    def layer_tensors(
        self, split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
    ) -> dict[str, Tensor]:
        """See :class:`Target`."""
        from moesaic.materialise.attention import pack_attention

        made = {f"{path}.{name}": tensor for path, ffn in packed.items() for name, tensor in ffn.items()} | dict(copied)
        for path, plan in split.attention.items():
            if path.startswith(f"{split.anatomy.layer_path(layer)}."):
                made |= pack_attention(copied, path, plan)
        return made

    def files(self) -> dict[str, str]:
        """See :class:`Target`. The modelling files."""
        return {name: (_RUNTIME / name).read_text(encoding="utf-8") for name in MODELLING_FILES}


TARGET = Moesaic(
    name="moesaic",
    summary="holds every blueprint; transformers with moesaic or trust_remote_code",
    engines=("transformers with our modelling file",),
)
