"""Apertus: ungated, xIELU with four scalars in every layer, norms on each head's queries and keys."""

from moesaic.anatomy.base import Attention, Family, FFNNames

FAMILY = Family(
    model_type="apertus",
    names=FFNNames(
        up="up_proj",
        down="down_proj",
        learned=("act_fn.alpha_p", "act_fn.alpha_n", "act_fn.beta", "act_fn.eps"),
    ),
    attention=Attention(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="head"),
)
