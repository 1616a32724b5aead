"""Tiny random checkpoints of every supported family, for tests: two layers, width 32, odd FFN width, nothing zero.

``build_tiny("qwen3", folder)`` writes a complete Hugging Face folder in milliseconds: config, safetensors, tokenizer
(a byte-level BPE that encodes any text). Equal arguments give equal bytes. torch is imported when it is needed.

Use as ``from tests.tiny_models import build_tiny, FAMILIES``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesaic.anatomy import FAMILIES as ANATOMIES

if TYPE_CHECKING:
    import torch

D_MODEL = 32
D_FF = 37
D_EXPERT = 40  # stock grouped_mm wants rows of whole 16 bytes; pass d_ff=37 where experts_implementation is "eager"
VOCAB = 300
BOS, EOS, PAD = 0, 0, 1

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GATED = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": D_FF}
_OPT = {**_COMMON, "ffn_dim": D_FF, "activation_function": "relu", "word_embed_proj_dim": D_MODEL}
_GPT_NEOX = {**_COMMON, "intermediate_size": D_FF}
_GPT2 = {"vocab_size": VOCAB, "n_embd": D_MODEL, "n_layer": 2, "n_head": 4}
_GEMMA = {**_GATED, "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
    "logits_scaling": 2.0,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": D_EXPERT}
_FULL_MOE = {**_GATED, "num_experts_per_tok": 2, "intermediate_size": D_EXPERT}
_QWEN2_MOE = {**_GATED, **_MOE, "shared_expert_intermediate_size": D_EXPERT + 3}
# As most families write it: the first layer dense, then experts with a shared one.
_ROUTED = {**_GATED, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": D_EXPERT}
_GLM_MOE = {**_ROUTED, "n_shared_experts": 2, "first_k_dense_replace": 1}

_LLAMA_TARGETS = ("glm4_moe", "granitemoeshared", "qwen2_moe", "mixtral", "ernie4_5_moe")


@dataclass(frozen=True)
class Tiny:
    """A row of the table: a tiny config, and what moesaic claims of it.

    Attributes:
        model_type, config: For transformers.
        prunes: Of its attention: "pairs" of queries and keys and values, "values" alone, or "nothing".
        targets: Stock architectures that hold it.
        zeroes_pad: transformers zeroes the padding token's embedding when it loads a checkpoint; so it is zero here.
    """

    model_type: str
    config: dict[str, Any]
    prunes: Literal["pairs", "values", "nothing"] = "nothing"
    targets: tuple[str, ...] = ()
    zeroes_pad: bool = False


_WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": D_FF,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
_LIGHTNING = {"layer_types": ["linear_attention", "full_attention"], "block_size": 16, "mlp_alpha_factor": 1.5}
_COMMAND = {"mlp_layer_types": ["dense", "sparse"], "prefix_dense_intermediate_size": D_FF}
_FALCON_H1 = {
    "head_dim": 8,
    **{"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16},
    **{"mlp_multipliers": [0.7, 0.3], "attention_out_multiplier": 0.9, "ssm_out_multiplier": 0.8},
    **{"key_multiplier": 0.5, "lm_head_multiplier": 0.5, "embedding_multiplier": 3.0},
}
_LFM2 = {"layer_types": ["conv", "full_attention"], "block_multiple_of": 1, "block_ffn_dim_multiplier": 1.03}

# Every bias that a family can have is on in one entry or in a variant.
TINY: dict[str, Tiny] = {
    "llama": Tiny("llama", {**_GATED, "tie_word_embeddings": True}, "pairs", _LLAMA_TARGETS),
    "granite": Tiny("granite", {**_GATED, **_MULTIPLIERS}, "pairs", ("granitemoeshared",)),
    "mistral": Tiny("mistral", {**_GATED, "sliding_window": None}, "pairs", _LLAMA_TARGETS),
    "qwen2": Tiny(
        "qwen2",
        {**_GATED, "tie_word_embeddings": True},
        "pairs",
        ("glm4_moe", "granitemoeshared", "qwen2_moe", "ernie4_5_moe"),
    ),
    "qwen3": Tiny("qwen3", {**_GATED, "head_dim": 16, "attention_bias": True}, "values", ("qwen3_moe",)),
    "gemma2": Tiny("gemma2", {**_GEMMA, "query_pre_attn_scalar": 8}, "pairs"),
    "gemma3": Tiny("gemma3_text", {**_GEMMA, "query_pre_attn_scalar": 8}, "values"),
    "phi3": Tiny("phi3", {**_GATED, "original_max_position_embeddings": 512}, targets=_LLAMA_TARGETS),
    "olmo2": Tiny("olmo2", {**_GATED, "attention_bias": True}, "values", ("flex_olmo",)),
    "smollm3": Tiny("smollm3", {**_GATED, "mlp_bias": True, "attention_bias": True, "no_rope_layers": [1, 0]}, "pairs"),
    "gpt2": Tiny("gpt2", {**_GPT2, "n_inner": D_FF}),
    "opt": Tiny("opt", _OPT),
    "gpt_neox": Tiny("gpt_neox", _GPT_NEOX),
    "phi": Tiny("phi", {**_COMMON, "intermediate_size": D_FF}),
    "mixtral": Tiny("mixtral", {**_FULL_MOE, "sliding_window": None, "num_local_experts": 4}),
    "qwen2_moe": Tiny("qwen2_moe", _QWEN2_MOE),
    "qwen3_moe": Tiny("qwen3_moe", {**_GATED, **_MOE, "head_dim": 8}),
    "olmoe": Tiny("olmoe", {**_FULL_MOE, "num_experts": 4}),
    "qwen3_next": Tiny("qwen3_next", {**_QWEN2_MOE, **_LINEAR, "head_dim": 16, "mlp_only_layers": [0]}),
    "deepseek_v2": Tiny("deepseek_v2", {**_LATENT, **_GLM_MOE, "num_key_value_heads": 4}),
    "deepseek_v3": Tiny("deepseek_v3", {**_LATENT, **_GLM_MOE, **_GROUPS, "num_key_value_heads": 4}),
    "dots1": Tiny("dots1", {**_GLM_MOE, **_GROUPS, "attention_bias": True}),
    "glm4_moe": Tiny("glm4_moe", {**_GLM_MOE, **_GROUPS, "attention_bias": True}),
    "glm4_moe_lite": Tiny("glm4_moe_lite", {**_LATENT, **_ROUTED, **_GROUPS, "num_key_value_heads": 4}),
    "ernie4_5_moe": Tiny(
        "ernie4_5_moe",
        {
            **_GATED,
            **{"head_dim": 16, "use_bias": True, "moe_intermediate_size": D_EXPERT, "moe_num_experts": 4, "moe_k": 2},
            **{"moe_num_shared_experts": 2, "moe_layer_start_index": 1},
        },
    ),
    "exaone_moe": Tiny("exaone_moe", {**_GATED, **_MOE, **_WINDOWS, **_GROUPS, "head_dim": 16}),
    "solar_open": Tiny("solar_open", {**_ROUTED, "n_shared_experts": 1}),
    "granitemoe": Tiny("granitemoe", {**_FULL_MOE, **_MULTIPLIERS, "num_local_experts": 4, "attention_bias": True}),
    "gpt_oss": Tiny("gpt_oss", {**_FULL_MOE, **_WINDOWS, "head_dim": 8, "num_local_experts": 4, "swiglu_limit": 0.4}),
    "granitemoe_swa": Tiny(
        "granitemoe_swa",
        {**_FULL_MOE, **_MULTIPLIERS, **_WINDOWS, "num_local_experts": 4, "shared_intermediate_size": D_EXPERT + 3},
    ),
    "granitemoehybrid": Tiny(
        "granitemoehybrid",
        {
            **{**_FULL_MOE, **_MULTIPLIERS, "num_local_experts": 4, "shared_intermediate_size": D_EXPERT + 3},
            **{"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
            **{"mamba_chunk_size": 16},
        },
    ),
    "granitemoeshared": Tiny(
        "granitemoeshared",
        {**_FULL_MOE, **_MULTIPLIERS, "num_local_experts": 4, "shared_intermediate_size": D_EXPERT + 3},
    ),
    "hunyuan_v1_moe": Tiny("hunyuan_v1_moe", {**_FULL_MOE, "head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    "minimax": Tiny("minimax", {**_FULL_MOE, "head_dim": 8, "num_local_experts": 4, **_LIGHTNING}),
    "minimax_m2": Tiny("minimax_m2", {**_FULL_MOE, "head_dim": 8, "num_local_experts": 4}),
    "phimoe": Tiny("phimoe", {**_FULL_MOE, "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True}),
    "flex_olmo": Tiny("flex_olmo", {**_FULL_MOE, "num_experts": 4}),
    "mellum": Tiny("mellum", {**_GATED, **_MOE, **_WINDOWS, "head_dim": 8, "mlp_layer_types": ["dense", "sparse"]}),
    "mimo_v2_flash": Tiny("mimo_v2_flash", {**_ROUTED, **_WINDOWS, "v_head_dim": 8}),
    "lfm2_moe": Tiny("lfm2_moe", {**_GATED, **_MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "jamba": Tiny(
        "jamba",
        {
            **_FULL_MOE,
            **{"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
            **{"mamba_dt_rank": 4, "use_mamba_kernels": False},
        },
    ),
    "afmoe": Tiny("afmoe", {**_GATED, **_MOE, **_WINDOWS, "head_dim": 8, "num_dense_layers": 1}),
    "cohere2_moe": Tiny(
        "cohere2_moe",
        {**_FULL_MOE, **_WINDOWS, "head_dim": 8, "num_experts": 4, "num_shared_experts": 2, **_COMMAND},
    ),
    "laguna": Tiny("laguna", {**_QWEN2_MOE, **_WINDOWS, "head_dim": 16}),
    "hy_v3": Tiny("hy_v3", {**_GATED, **_MOE, "head_dim": 8}),
    # Families that are a table and bring nothing new to what is computed.
    "olmo": Tiny("olmo", {**_GATED, "clip_qkv": 1.0}),
    "olmo3": Tiny("olmo3", {**_GATED, **_WINDOWS}, "values"),
    "ministral": Tiny("ministral", {**_GATED, "head_dim": 8, "sliding_window": 16}, "pairs", ("mixtral",)),
    "ministral3": Tiny("ministral3", {**_GATED, "head_dim": 16}),
    "seed_oss": Tiny("seed_oss", {**_GATED, "head_dim": 16}, "pairs", ("glm4_moe", "ernie4_5_moe")),
    "exaone4": Tiny("exaone4", {**_GATED, **_WINDOWS, "head_dim": 16}),
    "helium": Tiny("helium", {**_GATED, "head_dim": 8}, targets=_LLAMA_TARGETS),
    "ernie4_5": Tiny("ernie4_5", {**_GATED, "head_dim": 16}, targets=("glm4_moe", "mixtral", "ernie4_5_moe")),
    "cohere": Tiny("cohere", {**_GATED, "use_qk_norm": True}),
    "cohere2": Tiny("cohere2", {**_GATED, **_WINDOWS}),
    "cwm": Tiny("cwm", {**_GATED, **_WINDOWS, "head_dim": 8, "mlp_bias": True}, "pairs"),
    "hunyuan_v1_dense": Tiny("hunyuan_v1_dense", {**_GATED, "head_dim": 16}),
    "stablelm": Tiny("stablelm", {**_GATED, "use_qkv_bias": True, "qk_layernorm": True}),
    "diffllama": Tiny("diffllama", _GATED),
    "glm": Tiny("glm", {**_GATED, "head_dim": 16}, targets=("glm4_moe",)),
    "glm4": Tiny("glm4", {**_GATED, "head_dim": 16}),
    "qwen3_5_text": Tiny("qwen3_5_text", {**_GATED, **_LINEAR, "head_dim": 16}),
    "minicpm3": Tiny("minicpm3", {**_LATENT, "mlp_bias": True}),
    "hyperclovax": Tiny("hyperclovax", {**_GATED, **_MULTIPLIERS, "mlp_bias": True, "use_post_norm": True}),
    "youtu": Tiny("youtu", _LATENT, zeroes_pad=True),
    "starcoder2": Tiny("starcoder2", {**_GATED, "sliding_window": 16}, "pairs"),
    "gptj": Tiny("gptj", {**_GPT2, "n_inner": D_FF, "rotary_dim": 4, "n_positions": 512}),
    "arcee": Tiny("arcee", {**_GATED, "mlp_bias": True, "attention_bias": True}, "pairs"),
    "nemotron": Tiny("nemotron", {**_GATED, "head_dim": 8, "mlp_bias": True}),
    "vaultgemma": Tiny("vaultgemma", {**_GEMMA, "query_pre_attn_scalar": 8}, "pairs"),
    "gemma4_text": Tiny(
        "gemma4_text",
        {**_GEMMA, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    ),
    "lfm2": Tiny("lfm2", {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 55, **_LFM2}),
    "apertus": Tiny("apertus", {**_GATED, "head_dim": 8, "attention_bias": True}, "values"),
    "bamba": Tiny(
        "bamba",
        {
            **{**_GATED, "mlp_bias": True, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
            **{"mamba_d_state": 8, "mamba_chunk_size": 16},
        },
    ),
    "recurrent_gemma": Tiny(
        "recurrent_gemma",
        {
            **{**_COMMON, "num_key_value_heads": 1, "intermediate_size": 2 * D_FF, "lru_width": D_MODEL},
            **{"block_types": ["recurrent", "attention"], "attention_window_size": 16},
        },
    ),
    "falcon_h1": Tiny("falcon_h1", {**_GATED, **_FALCON_H1}),
    "falcon": Tiny("falcon", {**_COMMON, "ffn_hidden_size": D_FF, "bias": True}),
    # Variants: the rarer switches of a family.
    "llama_bias": Tiny("llama", {**_GATED, "mlp_bias": True, "attention_bias": True}, "pairs"),
    "gpt2_default_width": Tiny("gpt2", _GPT2),
    "opt_no_bias": Tiny("opt", {**_OPT, "enable_bias": False}),
    "opt_post_norm": Tiny("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "gpt_neox_sequential": Tiny("gpt_neox", {**_GPT_NEOX, "use_parallel_residual": False}),
    "gemma1": Tiny("gemma", {**_GATED, "head_dim": 8, "hidden_act": "gelu"}, "pairs"),
    "qwen2_moe_mixed": Tiny("qwen2_moe", {**_QWEN2_MOE, "mlp_only_layers": [0], "intermediate_size": 41}),
}

MOE_FAMILIES: list[str] = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]
VARIANTS: list[str] = [
    "llama_bias",
    "gpt2_default_width",
    "opt_no_bias",
    "opt_post_norm",
    "gpt_neox_sequential",
    "gemma1",
]
MOE_VARIANTS: list[str] = ["qwen2_moe_mixed", "granitemoeshared", "gpt_oss"]
FAMILIES: list[str] = [
    *("llama", "granite", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "smollm3"),
    *("gpt2", "opt", "gpt_neox", "phi", "apertus", "falcon_h1"),
]
"""Dense families that each bring something of their own to what is read, computed or written: for every matrix."""
_OTHERS = [name for name in TINY if name not in {*FAMILIES, *MOE_FAMILIES, *VARIANTS, *MOE_VARIANTS}]
MORE_FAMILIES: list[str] = [name for name in _OTHERS if ANATOMIES[TINY[name].model_type].moe is None]
MORE_MOE: list[str] = [name for name in _OTHERS if name not in MORE_FAMILIES]
"""The others, which one test converts from end to end (``tests/jobs/test_families.py``)."""
PRUNES_PAIRS: list[str] = [name for name, tiny in TINY.items() if tiny.prunes == "pairs"]
PRUNES_VALUES: list[str] = [name for name, tiny in TINY.items() if tiny.prunes == "values"]


def build_tiny(
    family: str,
    folder: Path,
    *,
    d_ff: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | str = "bfloat16",
    max_shard_size: str = "5GB",
    **config_overrides: Any,
) -> Path:
    """Write a tiny random checkpoint and return its folder.

    Args:
        family: A name from ``FAMILIES``, ``MOE_FAMILIES``, ``VARIANTS`` or ``MOE_VARIANTS``.
        folder: Where to write; created if missing.
        d_ff: Width of the FFN, of an expert in a MoE; 37, or 40 for experts of a MoE, when None.
        seed: Of the weights.
        dtype: Of the weights on disk, as a torch dtype or its name; bf16 by default, as most published checkpoints are.
        max_shard_size: ``"20KB"`` makes several shards and an index.
        config_overrides: Keys of config.json.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = AutoModelForCausalLM.from_config(tiny_config(family, d_ff=d_ff, **config_overrides), dtype=torch.float32)
    randomise(model, seed)
    if TINY[family].zeroes_pad:
        model.get_input_embeddings().weight.data[PAD] = 0
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_config(family: str, *, d_ff: int | None = None, **config_overrides: Any) -> Any:
    """The transformers config of a tiny model."""
    from transformers import AutoConfig

    model_type, config = TINY[family].model_type, TINY[family].config
    if d_ff is not None:
        anatomy = ANATOMIES[model_type]
        config = {**config, anatomy.moe.expert_width if anatomy.moe else anatomy.d_ff: d_ff}
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return AutoConfig.for_model(model_type, **{**config, **ids, **config_overrides})


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter random values: no zero bias, no norm weight of one, logits that tell tokens apart.

    Buffers that are stored as well (Gemma 4 scales its layers by one).
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    with torch.no_grad():
        stored = {tensor.data_ptr() for tensor in model.state_dict().values()}
        for parameter in [*parameters, *(buffer for buffer in model.buffers() if buffer.data_ptr() in stored)]:
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() <= 1:  # norm weights and biases, around the value that the family starts from
                parameter.add_(0.2 * noise)
            else:
                fan_in = D_MODEL if parameter.shape[-2] >= VOCAB else min(parameter.shape[-2:])
                parameter.copy_(noise / math.sqrt(fan_in))


@functools.lru_cache(maxsize=1)
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of ``VOCAB`` entries that encodes any text without unknown tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TRAINING_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=512,
    )


_TRAINING_TEXT = (
    "The expert that reads this sentence is not the one that reads the next. There is a router in between, and there "
    "are the weights of the other experts, which rest. All of them together are the network that they were taken from. "
) * 4
