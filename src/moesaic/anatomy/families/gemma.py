"""Gemma 1: gated, tanh-approximated GELU, no biases in the FFN, norms with 1 + w."""

from moesaic.anatomy.base import Attention, Config, Family

TANH_GELU = "gelu_pytorch_tanh"


def _activation(config: Config) -> str:
    # Its first releases say "gelu" and mean the tanh form.
    name = config.get("hidden_act") or TANH_GELU
    return TANH_GELU if name == "gelu" else name


FAMILY = Family(
    model_type="gemma",
    activation_of=_activation,
    attention=Attention(head_dim=256, qkv_bias="attention_bias", o_bias="attention_bias"),
    beyond_stock="GELU experts in more engines than transformers, and norms with 1 + w,",
)
