"""The architectures of llama.cpp that hold our outputs: their metadata, and what llama.cpp would compute wrongly.

llama.cpp loads several files that it then computes wrongly without a word: it has no RoPE factors in most MoE
architectures, no choice of router normalisation in qwen2moe, no sliding window in llama. Those are refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.checkpoint.converted import has_neuron_experts
from moesaic.errors import InputError, UnsupportedModelError

_SIGMOID = 2  # llama.cpp's number of this gating function
Values = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class Architecture:
    """How one transformers architecture appears in llama.cpp.

    Attributes:
        name: Of the architecture in llama.cpp.
        adjacent_rope: RoPE rotates adjacent pairs, where transformers rotates i and i + half: rows of query and key
            are reordered.
        rope_factors: Reads ``rope_freqs.weight``, which Llama 3's RoPE needs.
        qkv_bias, o_bias: Reads biases of these projections; others are ignored there.
        ffn_norm: Name of the norm before the FFN.
        values: Metadata beyond the common part.
        objections: What it would compute wrongly.
    """

    name: str
    values: Callable[[Any], Values]
    objections: Callable[[Any], list[str]]
    adjacent_rope: bool = False
    rope_factors: bool = False
    qkv_bias: bool = True
    o_bias: bool = False
    ffn_norm: str = "ffn_norm"


def _nothing(config: Any) -> Values:
    return {}


def _fine(config: Any) -> list[str]:
    return []


def _glm4moe(config: Any) -> Values:
    values: Values = {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_gating_func": _SIGMOID,
    }
    if (
        1 <= config.topk_group < config.n_group
    ):  # llama.cpp aborts where all groups are chosen: then they choose nothing
        values |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return values


def _granitemoe(config: Any) -> Values:
    values: Values = {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }
    shared = config.shared_intermediate_size
    return values | ({"expert_shared_feed_forward_length": shared} if shared else {})


def _mixtral(config: Any) -> Values:
    return {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}


def _qwen_moe(config: Any) -> Values:
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def _qwen2moe(config: Any) -> Values:
    return _qwen_moe(config) | {"expert_shared_feed_forward_length": config.shared_expert_intermediate_size}


def _qwen_dense_layers(config: Any) -> list[str]:
    dense = config.mlp_only_layers or config.decoder_sparse_step != 1
    return ["it has dense layers among the MoE ones, which llama.cpp's architecture cannot"] if dense else []


def _against_qwen3moe(config: Any) -> list[str]:
    plain = [] if config.norm_topk_prob else ["norm_topk_prob is false, llama.cpp always normalises there"]
    return _qwen_dense_layers(config) + plain


def _against_qwen2moe(config: Any) -> list[str]:
    found = _qwen_dense_layers(config)
    if config.norm_topk_prob:
        found.append("norm_topk_prob is true, which llama.cpp ignores there")
    return found


ARCHITECTURES: dict[str, Architecture] = {
    "glm4_moe": Architecture("glm4moe", _glm4moe, _fine, ffn_norm="post_attention_norm"),
    "granitemoeshared": Architecture(
        "granitemoe", _granitemoe, _fine, adjacent_rope=True, rope_factors=True, o_bias=True
    ),
    "mixtral": Architecture("llama", _mixtral, _fine, adjacent_rope=True, rope_factors=True),
    "qwen3_moe": Architecture("qwen3moe", _qwen_moe, _against_qwen3moe, qkv_bias=False),
    "qwen2_moe": Architecture("qwen2moe", _qwen2moe, _against_qwen2moe),
    "llama": Architecture("llama", _nothing, _fine, adjacent_rope=True, rope_factors=True, o_bias=True),
    "mistral": Architecture("llama", _nothing, _fine, adjacent_rope=True, rope_factors=True),
    "qwen2": Architecture("qwen2", _nothing, _fine),
    "qwen3": Architecture("qwen3", _nothing, _fine, qkv_bias=False),
}
"""transformers' model_type -> what it is in llama.cpp."""

_WITHOUT = {
    "moesaic": "llama.cpp does not know the moesaic architecture",
    "flex_olmo": "llama.cpp has no MoE with OLMo 2's norms",
    "ernie4_5_moe": "llama.cpp reads no correction bias of ernie4_5-moe's experts",
}


def architecture_of(raw: Mapping[str, Any]) -> Architecture:
    """That of a folder by its config.json. Raises UnsupportedModelError for one that has no place in llama.cpp."""
    model_type = str(raw.get("model_type"))
    if has_neuron_experts(raw):
        raise UnsupportedModelError(
            "llama.cpp has no experts of one neuron, and no stock architecture has their routers",
            "serve the folder with transformers, or write a GGUF of the dense model",
        )
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    reason = _WITHOUT.get(model_type, f"no GGUF is written from {model_type} folders")
    raise UnsupportedModelError(
        reason, "export to glm4_moe first (granitemoeshared for Llama 3's RoPE), then write the GGUF from that folder"
    )


def read_config(raw: dict[str, Any]) -> Any:
    """config.json with transformers' defaults filled in. Raises InputError for one that it rejects."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    except Exception as error:  # transformers validates strictly and with many exception types
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"transformers cannot read this config.json: {reason}", "is the folder complete?") from error


def check(architecture: Architecture, config: Any) -> None:
    """Refuse what llama.cpp would load and compute wrongly.

    Raises UnsupportedModelError with all reasons.
    """
    reasons = architecture.objections(config)
    if config.hidden_act not in ("silu", "swish"):
        reasons.append(f"activation {config.hidden_act}: llama.cpp computes SiLU")
    if window := _narrow_window(config):
        reasons.append(f"a sliding window of {window} tokens, which llama.cpp has not in {architecture.name}")
    kind = config.rope_parameters["rope_type"]
    if kind == "llama3" and not architecture.rope_factors:
        reasons.append(f"llama3 RoPE, whose factors llama.cpp does not read in {architecture.name}")
    elif kind not in ("default", "linear", "llama3"):
        reasons.append(f"{kind} RoPE, which was not compared with llama.cpp's")
    if reasons:
        hint = "export to granitemoeshared, then to GGUF" if kind == "llama3" else "serve the folder with transformers"
        raise UnsupportedModelError(f"llama.cpp would compute something else: {'; '.join(reasons)}", hint)


def check_graph(architecture: Architecture, config: Any, tensors: int) -> None:
    """Refuse a model whose graph has no room in llama.cpp, which ends the whole process when it loads such a file.

    llama.cpp allots max(1024, 8 tensors) nodes. A layer takes two per active expert, to add them up one by one, about
    57 more, and 12 for groups of experts [OURS: found by trying, rounded up].

    Raises UnsupportedModelError.
    """
    values = architecture.values(config)
    active = int(values.get("expert_used_count", 0))
    groups = 12 if "expert_group_count" in values else 0
    needed = config.num_hidden_layers * (2 * active + 57 + groups) + 30
    if active and needed > max(1024, 8 * tensors):
        raise UnsupportedModelError(
            f"{active} active experts are too many for llama.cpp: its graph has no room for them and it aborts",
            "use fewer experts (mlpmoe: --set branches=8), or --target dense where all are always on",
        )


def common_values(architecture: Architecture, config: Any) -> Values:
    """Metadata of the architecture, keys without its name in front."""
    head_dim = head_width(config)
    rope = config.rope_parameters
    # Of the dense layers where there are some, else of the experts; llama.cpp asks for it in any case.
    width = config.intermediate_size
    values: Values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": width,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": int(head_dim * float(rope.get("partial_rotary_factor") or 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return values | architecture.values(config)


def head_width(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _narrow_window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    narrow = window and window < config.max_position_embeddings and "sliding_attention" in kinds
    return window if narrow else None
