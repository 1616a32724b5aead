"""What all stock targets share without torch: sizes of the whole model, the common part of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.targets.backbone import Backbone
from moesaic.targets.base import Split, TargetOptions


@dataclass(frozen=True)
class Geometry:
    """Sizes that a stock config states once for all layers.

    Attributes:
        experts: Routed experts of a layer, the largest number.
        top_k: Active experts, the largest number.
        width: Neurons of an expert, aligned.
        shared: Neurons of the shared expert, the largest, aligned; 0 where no layer has one.
        dense: Layers without routed experts.
        dense_width: Neurons of the FFNs of those; of the original FFN where there are none.
    """

    experts: int
    top_k: int
    width: int
    shared: int
    dense: tuple[int, ...]
    dense_width: int

    @property
    def shared_multiple(self) -> int:
        """Width of the shared expert in experts, rounded up."""
        return aligned(self.shared, self.width) // self.width


def geometry(split: Split, options: TargetOptions) -> Geometry:
    """The sizes of the whole model. Layers without routed experts count as dense."""
    moe = split.routed
    dense = tuple(split.dense_layers)
    shapes = [split.shape_of(layer) for layer in dense]
    return Geometry(
        experts=max(shape.experts for shape in moe),
        top_k=max(shape.top_k for shape in moe),
        width=aligned(max(shape.width for shape in moe), options.align),
        shared=aligned(max(shape.shared for shape in moe), options.align),
        dense=dense,
        dense_width=max(
            (split.anatomy.d_ff if shape is None else shape.shared for shape in shapes), default=split.anatomy.d_ff
        ),
    )


def aligned(width: int, multiple: int) -> int:
    """``width`` rounded up to a multiple."""
    return -(-width // multiple) * multiple


def base_config(
    split: Split, backbone: Backbone, model_type: str, architecture: str, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The part of config.json that all stock targets have in common; for RoPE, keys of transformers 5 and older ones.

    Token ids are always written, null as well, as the target's own defaults are other ids.
    """
    dense = backbone.config
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": dense.vocab_size,
        "hidden_size": dense.hidden_size,
        "num_hidden_layers": dense.num_hidden_layers,
        "num_attention_heads": dense.num_attention_heads,
        "num_key_value_heads": dense.num_key_value_heads,
        "head_dim": backbone.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": dense.max_position_embeddings,
        "rms_norm_eps": dense.rms_norm_eps,
        "rope_parameters": backbone.rope,
        "rope_theta": backbone.rope["rope_theta"],
        "attention_dropout": 0.0,
        "initializer_range": dense.initializer_range,
        "use_cache": True,
        "tie_word_embeddings": False,
        **{key: getattr(dense, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "moesaic": dict(provenance),
    }
    if backbone.rope["rope_type"] != "default":
        config["rope_scaling"] = {key: value for key, value in backbone.rope.items() if key != "rope_theta"}
    dtype = split.anatomy.config.get("dtype") or split.anatomy.config.get("torch_dtype")
    return config if dtype is None else config | {"dtype": dtype, "torch_dtype": dtype}
