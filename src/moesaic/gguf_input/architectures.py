"""llama.cpp's architectures that are read: what each is in transformers, and where its tensors go there.

One entry per architecture; the keys that an entry does not take and the tensors that it does not place are refused by
name. Numbers that llama.cpp has in its code and not in the file are named as such (llama.cpp, src/llama-model.cpp and
src/models). The tests compare every entry with llama.cpp itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moesaic.errors import CheckpointError, UnsupportedModelError
from moesaic.gguf_input.header import Header
from moesaic.gguf_input.keys import Keys
from moesaic.gguf_input.rope import rope_parameters

Config = dict[str, Any]
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_FFN = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_QKV = ("attn_q", "attn_k", "attn_v")
_ATTENTION_BIAS = {"attention_bias": (*_QKV, "attn_output")}
_FULL_ATTENTION: Config = {"use_sliding_window": False, "sliding_window": None}
_MLP_BIAS = {"mlp_bias": tuple(_FFN)}


@dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures appears in transformers.

    Attributes:
        model_type: transformers' name of it.
        causal: transformers' class of the model with its head.
        config: The config beyond what :func:`model_config` sets for all; takes its keys.
        layer: Modules of a layer, file's name -> checkpoint's name below ``layers``.
        top: The other modules, likewise.
        layers: Where the layers are in the checkpoint.
        biases: Modules that have a bias in any case.
        switches: Keys of the config -> modules that have a bias when it is true, where llama.cpp reads these biases.
        experts: Stacks of experts -> name of one expert's matrix, with ``{}`` for its number.
        adjacent_rope: RoPE rotates adjacent pairs in the file, i and i + half in transformers.
        norm_offset: Norms are stored with 1 added.
        transposed: Modules whose matrices transformers stores [in, out].
        rows: Modules stored as a vector in the file and as a matrix of one row in the checkpoint.
    """

    model_type: str
    causal: str
    config: Callable[[Keys, Header], Config]
    layer: Mapping[str, str]
    top: Mapping[str, str] = field(default_factory=lambda: _TOP)
    layers: str = "model.layers"
    biases: tuple[str, ...] = ()
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    adjacent_rope: bool = False
    norm_offset: bool = False
    transposed: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


def _decoder(keys: Keys, header: Header, *, partial: bool = False, ffn_width: int | None = None) -> Config:
    """What all but GPT-2 say in the same words. ``partial``: a part of a head may rotate; ``ffn_width``: by default."""
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    context, plain = keys.size("context_length"), max(hidden // heads, 1)
    width = keys.size("attention.key_length", plain)
    keys.expect("attention.value_length", width, f"keys have heads of {width}")
    rotary = keys.size("rope.dimension_count", width)
    if rotary != width and not partial:
        raise UnsupportedModelError(
            f"{header.file} rotates {rotary} of the {width} dimensions of a head ({keys.prefix}rope.dimension_count)",
            "convert the original checkpoint in place of the GGUF",
        )
    rope = rope_parameters(keys, header, context, rotary)
    return {
        "hidden_size": hidden,
        "num_hidden_layers": _layers(keys, header),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "head_dim": width,
        "intermediate_size": keys.size("feed_forward_length")
        if ffn_width is None
        else keys.size("feed_forward_length", ffn_width),
        "max_position_embeddings": context,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope | ({"partial_rotary_factor": rotary / width} if partial else {}),
        "hidden_act": "silu",
    }


def _layers(keys: Keys, header: Header) -> int:
    count = keys.size("block_count")
    if not any(name.startswith(f"blk.{count - 1}.") for name in header.tensors):
        raise CheckpointError(
            f"{header.file} has no tensor of layer {count - 1}, though {keys.prefix}block_count is {count}",
            "download it again",
        )
    return count


def _llama(keys: Keys, header: Header) -> Config:
    return _decoder(keys, header)


def _mixtral(keys: Keys, header: Header) -> Config:
    experts = {
        "num_local_experts": keys.size("expert_count"),
        "num_experts_per_tok": keys.size("expert_used_count"),
        "sliding_window": None,
    }
    return _decoder(keys, header) | experts


def _qwen(keys: Keys, header: Header) -> Config:
    return _decoder(keys, header) | _FULL_ATTENTION


def _qwen_moe(keys: Keys, header: Header) -> Config:
    experts = {
        "num_experts": keys.size("expert_count"),
        "num_experts_per_tok": keys.size("expert_used_count"),
        "moe_intermediate_size": keys.size("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    # The width of dense layers, which there are none of: a file may leave it out.
    config = _decoder(keys, header, ffn_width=experts["moe_intermediate_size"])
    return config | _FULL_ATTENTION | experts


def _qwen2moe(keys: Keys, header: Header) -> Config:
    shared = {"shared_expert_intermediate_size": keys.size("expert_shared_feed_forward_length")}
    return _qwen_moe(keys, header) | shared | {"norm_topk_prob": False}  # llama.cpp's code


def _qwen3moe(keys: Keys, header: Header) -> Config:
    return _qwen_moe(keys, header) | {"norm_topk_prob": True}  # llama.cpp's code


def _granite(keys: Keys, header: Header) -> Config:
    keys.expect("rope.scaling.finetuned", True, "a model without positions")
    config = _decoder(keys, header)
    return config | {
        "attention_multiplier": keys.number("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "logits_scaling": keys.number("logit_scale", 1.0),
    }


def _smollm3(keys: Keys, header: Header) -> Config:
    config = _decoder(keys, header)
    layers = config["num_hidden_layers"]
    return config | {
        "no_rope_layer_interval": 4,  # llama.cpp's code
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(layers)],
        "layer_types": ["full_attention"] * layers,
        **_FULL_ATTENTION,
    }


def _phi3(keys: Keys, header: Header) -> Config:
    config = _decoder(keys, header, partial=True)
    rope = config["rope_parameters"]
    original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    window = keys.number("attention.sliding_window", 0)
    return config | {
        "original_max_position_embeddings": original,
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "sliding_window": int(window) or None,  # llama.cpp switches it off, but the model has it
    }


def _gemma(keys: Keys, header: Header) -> Config:
    tanh = "gelu_pytorch_tanh"
    return _decoder(keys, header) | {"hidden_act": tanh, "hidden_activation": tanh}


def _windowed_gemma(keys: Keys, header: Header, period: int, largest: int) -> Config:
    """Gemma 2 and 3: sliding windows in all but every ``period``-th layer.

    The scale of queries is in no file: llama.cpp takes that of the largest model where the number of layers is that
    model's, else that of a head's width.
    """
    window = keys.size("attention.sliding_window")
    period = keys.size("attention.sliding_window_pattern", period)
    config = _gemma(keys, header)
    layers, per_head = config["num_hidden_layers"], config["hidden_size"] // config["num_attention_heads"]
    full = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]
    return config | {
        "sliding_window": window,
        "layer_types": full,
        "query_pre_attn_scalar": per_head if layers == largest else config["head_dim"],
        "attention_bias": False,
    }


def _gemma2(keys: Keys, header: Header) -> Config:
    return _windowed_gemma(keys, header, 2, 46) | {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys, header: Header) -> Config:
    local = keys.number("rope.freq_base_swa", 10000.0)
    config = _windowed_gemma(keys, header, 6, 62)
    ropes = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    capping = keys.number("final_logit_softcapping", 0.0) or None
    return config | {"rope_parameters": ropes, "final_logit_softcapping": capping, "attn_logit_softcapping": None}


def _gpt2(keys: Keys, header: Header) -> Config:
    hidden = keys.size("embedding_length")
    heads = keys.size("attention.head_count")
    keys.expect("attention.head_count_kv", heads, "GPT-2 has no shared keys and values")
    return {
        "n_embd": hidden,
        "n_layer": _layers(keys, header),
        "n_head": heads,
        "n_positions": keys.size("context_length"),
        "n_inner": keys.size("feed_forward_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


_LLAMA = Architecture(
    "llama",
    "LlamaForCausalLM",
    _llama,
    {**_PRE_NORMS, **_ATTENTION, **_FFN},
    switches=_ATTENTION_BIAS | _MLP_BIAS,
    adjacent_rope=True,
)
_QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM", _qwen, _LLAMA.layer, biases=_QKV)
_QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", _qwen, {**_LLAMA.layer, **_HEAD_NORMS}, switches=_ATTENTION_BIAS)
_GEMMA = Architecture("gemma", "GemmaForCausalLM", _gemma, _LLAMA.layer, norm_offset=True)
_GEMMA2 = replace(
    _GEMMA,
    model_type="gemma2",
    causal="Gemma2ForCausalLM",
    config=_gemma2,
    layer={
        **_ATTENTION,
        **_FFN,
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
)
_EXPERTS = {f"ffn_{role}_exps": f"mlp.experts.{{}}.{role}_proj" for role in ("gate", "up", "down")}
_SHARED = {f"ffn_{role}_shexp": f"mlp.shared_expert.{role}_proj" for role in ("gate", "up", "down")}
_MOE_LAYER = {**_PRE_NORMS, **_ATTENTION, "ffn_gate_inp": "mlp.gate"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "granite": replace(_LLAMA, model_type="granite", causal="GraniteForCausalLM", config=_granite),
    "smollm3": replace(_LLAMA, model_type="smollm3", causal="SmolLM3ForCausalLM", config=_smollm3, switches={}),
    "olmo2": Architecture(
        "olmo2",
        "Olmo2ForCausalLM",
        _llama,
        {
            **_ATTENTION,
            **_FFN,
            **_HEAD_NORMS,
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        _phi3,
        {
            **_PRE_NORMS,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": replace(
        _GEMMA2,
        model_type="gemma3_text",
        causal="Gemma3ForCausalLM",
        config=_gemma3,
        layer={**_GEMMA2.layer, **_HEAD_NORMS},
    ),
    "gpt2": Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        _gpt2,
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layers="transformer.h",
        biases=("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"),
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _qwen2moe,
        {**_MOE_LAYER, **_SHARED, "ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
        biases=_QKV,
        experts=_EXPERTS,
        rows=("ffn_gate_inp_shexp",),
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _qwen3moe,
        {**_MOE_LAYER, **_HEAD_NORMS},
        switches=_ATTENTION_BIAS,
        experts=_EXPERTS,
    ),
}
"""llama.cpp's name -> what it is in transformers."""

_MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    _mixtral,
    {**_PRE_NORMS, **_ATTENTION, "ffn_gate_inp": "block_sparse_moe.gate"},
    experts={
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
    adjacent_rope=True,
)


def architecture_of(header: Header) -> Architecture:
    """The entry of a header whose architecture is in ``ARCHITECTURES``. llama with experts is Mixtral."""
    if header.architecture == "llama" and header.metadata.get("llama.expert_count"):
        return _MIXTRAL
    return ARCHITECTURES[header.architecture]


def model_config(header: Header, architecture: Architecture) -> Config:
    """config.json of the dequantised checkpoint, but for the dtype.

    Raises:
        UnsupportedModelError: a key that this config cannot say, named.
        CheckpointError: a key is missing or no number.
    """
    keys = Keys(header)
    keys.ignore("vocab_size")  # the embeddings have it
    keys.expect("attention.causal", True, "moesaic converts models that read from left to right")
    embeddings = header.tensors["token_embd.weight"]
    common: Config = {
        "model_type": architecture.model_type,
        "architectures": [architecture.causal],
        "vocab_size": embeddings.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        common[f"{name}_token_id"] = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    config = common | architecture.config(keys, header)
    if config.get("num_local_experts") is None and config.get("num_experts") is None:
        for name in ("expert_count", "expert_used_count"):
            keys.expect(name, 0, "experts in an architecture that has none")
    for switch, modules in architecture.switches.items():
        ends = tuple(f".{module}.bias" for module in modules)
        config[switch] = any(name.endswith(ends) for name in header.tensors)
    keys.check_used(architecture.model_type)
    return config
