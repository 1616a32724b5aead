"""Why a model cannot be converted, told from its config.json alone. One table per reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moesaic.anatomy.base import Config, Family
from moesaic.anatomy.others import DECODERS, HOW_TO_ADD, kind_of
from moesaic.anatomy.wrappers import CHANGED, WRAPPERS
from moesaic.errors import UnsupportedModelError

# Activations that moesaic computes; moesaic.nn.ffn holds the functions (a test keeps the two alike).
ACTIVATIONS = frozenset({"silu", "swish", "relu", "relu2", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"})
LEARNED = frozenset({"xielu"})
"""Activations with tensors of their own, in families that name these (``FFNNames.learned``)."""

_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForRewardModel",
)
_PER_LAYER = {
    "layer_types": False,
    "mlp_layer_types": False,
    "no_rope_layers": True,
}  # whether transformers takes a list that is too long
_SIZES = ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
_TORCH_DTYPE = re.compile(r"bfloat16|float16|float32|float64|float|half|double")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def refuse_foreign(config: Config, families: Mapping[str, Family]) -> None:
    """Raise UnsupportedModelError, with reason and hint, for a config that no family of ours describes."""
    if "peft_type" in config:
        raise UnsupportedModelError(f"this is a PEFT adapter ({config['peft_type']}), not a model", MERGE_HINT)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UnsupportedModelError("config.json has no model_type", "give a Hugging Face language model")
    for check in (_moesaic, _quantised):
        check(config, model_type)
    _multimodal(config, model_type, families)
    if model_type not in families:
        _other_kind(config, model_type)
    for check in (_head, _tuples, _token_ids, _numbers, _dtype):
        check(config, model_type)
    if model_type not in families:
        _unknown(config, model_type, sorted(families))


RECIPES = "docs/checkpoints.md"
MERGE_HINT = f"merge it into its base model first and convert that: {RECIPES} has the lines"


def _moesaic(config: Config, model_type: str) -> None:
    if model_type == "moesaic" or "moesaic" in config:
        raise UnsupportedModelError(
            "this model was already converted by moesaic",
            "convert the dense original; `moesaic undo` rebuilds it",
        )


def _quantised(config: Config, model_type: str) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.get(key) == {}:
            raise UnsupportedModelError(
                f"config.json of this {model_type} model has an empty {key}, with which transformers cannot load it",
                "remove that line from config.json",
            )
        if config.get(key):
            settings: Any = config[key]
            method = settings.get("quant_method", "unnamed method") if isinstance(settings, dict) else "unnamed method"
            raise UnsupportedModelError(
                f"this {model_type} model is quantised ({method})",
                "convert the full-precision original, then quantise the result",
            )


def _multimodal(config: Config, model_type: str, families: Mapping[str, Family]) -> None:
    inner = config.get("text_config") or config.get("llm_config") or config.get("thinker_config")
    if not isinstance(inner, dict) and not any(key in config for key in ("vision_config", "audio_config")):
        return
    text: Config = inner if isinstance(inner, dict) else {}
    text_type = text.get("model_type") or f"{model_type}_text"  # files from before wrappers named it
    if model_type in WRAPPERS:  # a folder is read as its text model; only a config by itself comes here
        why = "whose text model is converted"
        hint = "give its folder, or the config that moesaic.checkpoint.text_model.text_config makes of this one"
        raise UnsupportedModelError(f"{model_type} is a multimodal wrapper around {text_type}, {why}", hint)
    if reason := CHANGED.get(model_type):
        message = f"{model_type} is a multimodal wrapper, and {reason}"
    elif any(isinstance(text.get(key), int) and text[key] > 1 for key in _EXPERT_KEYS):
        message = f"{model_type} is a multimodal wrapper around {text_type}, which is already a Mixture of Experts"
    elif text_type in families:
        message = f"moesaic does not know the multimodal wrapper {model_type}, though its text model, {text_type}"
    else:
        message = f"{model_type} is a multimodal wrapper around {text_type}, which moesaic does not know"
    raise UnsupportedModelError(message, "docs/families.md lists the wrappers whose text model is converted")


def _tuples(config: Config, model_type: str) -> None:
    if config.get("return_dict") is False:
        raise UnsupportedModelError(
            f"config.json of this {model_type} model has return_dict = false, with which transformers cannot run it",
            "remove that line from config.json",
        )


def _token_ids(config: Config, model_type: str) -> None:
    """Refuse token ids of a kind that transformers refuses."""
    where = f"config.json of this {model_type} model"
    for key, lists in (("pad_token_id", False), ("bos_token_id", False), ("eos_token_id", True)):
        value = config.get(key)
        values = value if lists and isinstance(value, list) else [value]
        if not all(entry is None or (isinstance(entry, int) and not isinstance(entry, bool)) for entry in values):
            kind = "a whole number or a list of them" if lists else "one whole number, or null"
            raise UnsupportedModelError(f"{where} has {key} = {str(value)[:40]}", f"it must be {kind}")


def _numbers(config: Config, model_type: str) -> None:
    """Refuse sizes that are no whole numbers; those that a family needs are looked at with its own keys."""
    for key in _SIZES:
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UnsupportedModelError(
                f"config.json of this {model_type} model has {key} = {value!r}", "it must be a positive whole number"
            )


def _dtype(config: Config, model_type: str) -> None:
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is not None and not (isinstance(value, str) and _TORCH_DTYPE.fullmatch(value)):
            raise UnsupportedModelError(
                f"config.json of this {model_type} model has {key} = {value!r}, which transformers does not know",
                "write bfloat16, float16 or float32",
            )


def refuse_layers(config: Config, num_layers: int) -> None:
    """Refuse a list with an entry for each layer that has another length, as pruning of layers can leave it."""
    for key, may_be_longer in _PER_LAYER.items():
        entries = config.get(key)
        if isinstance(entries, list) and len(entries) != num_layers and not (may_be_longer and entries[num_layers:]):
            raise UnsupportedModelError(
                f"config.json has {len(entries)} {key} for {num_layers} layers",
                f"mend {key}: one entry for each layer that is there",
            )


def _other_kind(config: Config, model_type: str) -> None:
    if kind := kind_of(model_type):
        raise UnsupportedModelError(f"{model_type} {kind.reason}", kind.hint)
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{model_type} is an encoder-decoder", DECODERS)


def _head(config: Config, model_type: str) -> None:
    named = config.get("architectures") or ()
    for architecture in map(str, named if isinstance(named, list) else [named]):
        bare = architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
        if bare or architecture.endswith(_HEADS):
            raise UnsupportedModelError(
                f"this {model_type} checkpoint is a {architecture}, which has no language-model head",
                "use the checkpoint of the causal language model",
            )


def _unknown(config: Config, model_type: str, known: list[str]) -> None:
    if any(isinstance(config.get(key), int) and config[key] > 1 for key in _EXPERT_KEYS):
        raise UnsupportedModelError(
            f"{model_type} is already a Mixture of Experts, of a family that moesaic does not know", HOW_TO_ADD
        )
    # Only another spelling: a name that is merely near may be another family.
    near = [name for name in known if _letters(name) == _letters(model_type)]
    hint = f"did you mean {near[0]}?" if near else HOW_TO_ADD
    raise UnsupportedModelError(f"moesaic does not know the model type {model_type!r}", hint)


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())
