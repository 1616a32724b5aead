"""Every model that cannot be converted is refused with its reason and with what to do instead."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from moesaic.anatomy import FAMILIES, read_anatomy
from moesaic.errors import UnsupportedModelError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "hidden_act": "silu",
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}

# name: (config, hierarchical, part of the message, part of the hint)
REFUSED: dict[str, tuple[dict[str, Any], bool, str, str]] = {
    "gptq": ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, False, "quantised .gptq", "full-precision"),
    "awq": ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, False, "quantised .awq", "full-precision"),
    "bnb": ({**LLAMA, "quantization_config": BNB}, False, "quantised .bitsandbytes", "full-precision"),
    "fp8": ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, False, "quantised .fp8", "full-precision"),
    "sparse": ({**LLAMA, "compression_config": {"format": "x"}}, False, "quantised", "full-precision"),
    "quantised and MoE": ({**MIXTRAL, "quantization_config": {"quant_method": "awq"}}, True, "quantised", "original"),
    "bert": ({"model_type": "bert"}, False, "bert is an encoder", "decoder-only"),
    "modernbert": ({"model_type": "modernbert"}, False, "encoder", "decoder-only"),
    "t5": ({"model_type": "t5", "is_encoder_decoder": True}, False, "t5 is an encoder-decoder", "decoder-only"),
    "other seq2seq": ({"model_type": "new", "is_encoder_decoder": True}, False, "encoder-decoder", "decoder-only"),
    "mamba": ({"model_type": "mamba2"}, False, "mamba2 is a state-space", "decoder-only"),
    "rwkv": ({"model_type": "rwkv"}, False, "state-space or recurrent", "decoder-only"),
    "gemma 3 multimodal": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}},
        False,
        "multimodal wrapper around gemma3_text, whose text model is converted",
        "give its folder",
    ),
    "another wrapper": (
        {"model_type": "janus", "text_config": {"model_type": "llama"}, "vision_config": {}},
        False,
        "does not know the multimodal wrapper janus, though its text model, llama",
        "docs/families.md lists",
    ),
    "cross-attention to images": ({"model_type": "mllama", "vision_config": {}}, False, "attend to the image", ""),
    "wrapped MoE": (
        {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text", "num_experts": 8}},
        False,
        "around qwen3_vl_moe_text, which is already a Mixture of Experts",
        "lists the wrappers",
    ),
    "multimodal around an unknown one": (
        {"model_type": "new", "text_config": {"model_type": "new_text"}},
        False,
        "multimodal wrapper around new_text, which moesaic does not know",
        "lists the wrappers",
    ),
    "tuples": ({**LLAMA, "return_dict": False}, False, "return_dict = false", "remove that line"),
    "list of pad tokens": ({**LLAMA, "pad_token_id": [1]}, False, r"pad_token_id = \[1\]", "one whole number"),
    "end token of text": ({**LLAMA, "eos_token_id": "</s>"}, False, "eos_token_id = </s>", "or a list"),
    "layer types of more layers": (
        {**LLAMA, "layer_types": ["full_attention"] * 6},
        False,
        "6 layer_types for 2",
        "mend",
    ),
    "too few NoPE layers": ({**LLAMA, "no_rope_layers": [1]}, False, "1 no_rope_layers for 2", "mend"),
    "moesaic": ({"model_type": "moesaic", "text_config": LLAMA}, False, "already converted by moesaic", "undo"),
    "moesaic target": ({**LLAMA, "moesaic": {"version": "0.1.0"}}, False, "already converted", "undo"),
    "adapter": ({"peft_type": "LORA", "base_model_name_or_path": "x"}, False, "PEFT adapter .LORA", "merge"),
    "no model_type": ({"hidden_size": 32}, False, "no model_type", "Hugging Face"),
    "odd model_type": ({"model_type": 7}, False, "no model_type", "Hugging Face"),
    "new family": (
        {"model_type": "newt"},
        False,
        "does not know the model type 'newt'",
        "CONTRIBUTING.md.*issue tracker",
    ),
    "a name near a known one": ({"model_type": "qwen9"}, False, "'qwen9'", "^add it as CONTRIBUTING.md"),
    "dense and not described": ({"model_type": "codegen"}, False, "a dense decoder", "CONTRIBUTING.md"),
    "scaled biases": (
        {"model_type": "falcon_h1", "mlp_bias": True, "mlp_multipliers": [1, 0.5]},
        False,
        "multiplies biases of its FFN",
        "",
    ),
    "layers that hand on more": ({"model_type": "glm_moe_dsa"}, False, "hand on more than hidden", "families.md"),
    "MoE without experts": (
        {**LLAMA, "model_type": "granitemoehybrid", "num_local_experts": 0},
        False,
        "it has no experts",
        "",
    ),
    "spelt otherwise": ({"model_type": "Qwen_2"}, False, "'Qwen_2'", "did you mean qwen2"),
    "MoE of another family": ({"model_type": "axk1", "n_routed_experts": 256}, False, "Mixture of Exp", "families.md"),
    "new MoE": ({"model_type": "newt_moe", "n_routed_experts": 256}, False, "already a Mixture", "families.md"),
    "classifier": ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, False, "no language-model head", ""),
    "embedding model": ({**LLAMA, "architectures": ["LlamaModel"]}, False, "LlamaModel", "causal language model"),
    "architectures of numbers": ({"model_type": "new", "architectures": [3]}, False, "does not know", ""),
    "countless layers": ({**LLAMA, "num_hidden_layers": 10**7}, False, "num_hidden_layers = 10000000", "at most"),
    "MoE": (MIXTRAL, False, "mixtral is already a Mixture of Experts", "--hierarchical"),
    "dense with --hierarchical": (LLAMA, True, "llama is a dense model", "leave out --hierarchical"),
    "gemma 4 with embeddings per layer": (
        {**LLAMA, "model_type": "gemma4_text", "hidden_activation": None},
        False,
        "each of its layers reads an embedding of its own",
        "",
    ),
    "gemma 4 with shared keys": (
        {**LLAMA, "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 1},
        False,
        "keys and values of others",
        "",
    ),
    "gemma 4 with experts": ({**LLAMA, "model_type": "gemma4_text", "enable_moe_block": True}, False, "experts", ""),
    "cross-attention": (
        {
            "model_type": "gpt2",
            "n_embd": 8,
            "n_layer": 1,
            "activation_function": "gelu_new",
            "add_cross_attention": True,
        },
        False,
        "cross-attention",
        "",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    config, hierarchical, message, hint = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        read_anatomy(config, hierarchical=hierarchical)
    assert "\n" not in str(caught.value)
    assert re.search(hint, caught.value.hint)


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {**LLAMA, "pad_token_id": -1, "eos_token_id": [1, 2], "no_rope_layers": [1] * 6},
        {**LLAMA, "architectures": ["LlamaForCausalLM"], "quantization_config": None, "auto_map": {}},
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": 8,
            "n_layer": 1,
            "activation_function": "relu",
        },
    ],
)
def test_accepted(config: dict) -> None:
    assert read_anatomy(config).sites


def test_no_model_type_of_transformers_is_taken_for_a_misspelling() -> None:
    """A real family that is none of ours must never be told to be another."""
    for name in CONFIG_MAPPING:
        if name in FAMILIES:
            continue
        with pytest.raises(UnsupportedModelError) as caught:
            read_anatomy({"model_type": name})
        assert "did you mean" not in str(caught.value)
