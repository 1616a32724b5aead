"""Why a model cannot be converted, told from its config.json alone. One table per reason."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from moesaic.anatomy.base import Config
from moesaic.errors import UnsupportedModelError

# Activations that moesaic computes; moesaic.nn.ffn holds the functions (a test keeps the two alike).
ACTIVATIONS = frozenset({"silu", "swish", "relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"})

# fmt: off
_ENCODERS = frozenset({
    "albert", "bert", "big_bird", "camembert", "canine", "convbert", "deberta", "deberta-v2", "distilbert",
    "electra", "ernie", "esm", "eurobert", "flaubert", "fnet", "funnel", "gte", "ibert", "layoutlm",
    "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mra", "nomic_bert",
    "nystromformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "xlm",
    "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
})
_ENCODER_DECODERS = frozenset({
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "fsmt", "led", "longt5",
    "m2m_100", "marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet",
    "seamless_m4t", "speech_to_text", "switch_transformers", "t5", "t5gemma", "udop", "umt5", "whisper",
})
_STATE_SPACE = frozenset({
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h",
    "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
})
# fmt: on
_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForRewardModel",
)
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def refuse_foreign(config: Config, known: Iterable[str]) -> None:
    """Raise UnsupportedModelError, with reason and hint, for a config that no family of ours describes."""
    if "peft_type" in config:
        raise UnsupportedModelError(f"this is a PEFT adapter ({config['peft_type']}), not a model", MERGE_HINT)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UnsupportedModelError("config.json has no model_type", "give a Hugging Face language model")
    for check in (_moesaic, _quantised, _multimodal, _other_kind, _head):
        check(config, model_type)
    known = sorted(known)
    if model_type not in known:
        _unknown(config, model_type, known)


MERGE_HINT = "merge it into its base model first (peft: merge_and_unload, then save_pretrained)"


def _moesaic(config: Config, model_type: str) -> None:
    if model_type == "moesaic" or "moesaic" in config:
        raise UnsupportedModelError(
            "this model was already converted by moesaic",
            "convert the dense original; `moesaic undo` rebuilds it",
        )


def _quantised(config: Config, model_type: str) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            settings: Any = config[key]
            method = settings.get("quant_method", "unnamed method") if isinstance(settings, dict) else "unnamed method"
            raise UnsupportedModelError(
                f"this {model_type} model is quantised ({method})",
                "convert the full-precision original, then quantise the result",
            )


def _multimodal(config: Config, model_type: str) -> None:
    inner = config.get("text_config") or config.get("llm_config") or config.get("thinker_config")
    if isinstance(inner, dict) or any(key in config for key in ("vision_config", "audio_config")):
        text_type = inner.get("model_type") if isinstance(inner, dict) else None
        raise UnsupportedModelError(
            f"{model_type} is a multimodal wrapper around {text_type or 'a text model'}",
            f"save its text model ({text_type or 'language_model'}) as a checkpoint of its own and convert that",
        )


def _other_kind(config: Config, model_type: str) -> None:
    if model_type in _ENCODERS:
        kind = "an encoder without a language-model head"
    elif model_type in _ENCODER_DECODERS or config.get("is_encoder_decoder"):
        kind = "an encoder-decoder"
    elif model_type in _STATE_SPACE:
        kind = "a state-space or recurrent model"
    else:
        return
    raise UnsupportedModelError(f"{model_type} is {kind}", "moesaic converts decoder-only transformers")


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
            f"{model_type} is already a Mixture of Experts, of a family that moesaic does not know",
            f"known families: {', '.join(known)}",
        )
    near = difflib.get_close_matches(model_type, known, n=1)
    suggestion = f"did you mean {near[0]}? " if near else ""
    raise UnsupportedModelError(
        f"moesaic does not know the model type {model_type!r}", f"{suggestion}known: {', '.join(known)}"
    )
