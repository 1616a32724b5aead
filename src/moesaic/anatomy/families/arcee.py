"""Arcee AFM: Llama's layout with an ungated FFN, squared ReLU."""

from moesaic.anatomy.base import Attention, Family, FFNNames

FAMILY = Family(
    model_type="arcee",
    names=FFNNames(up="up_proj", down="down_proj"),
    attention=Attention(qkv_bias="attention_bias", o_bias="attention_bias"),
    ffn_bias="mlp_bias",
)
