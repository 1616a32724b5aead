"""StarCoder2: ungated, tanh GELU, one key for all biases, norms that take off the mean."""

from moesaic.anatomy.base import Attention, Family, FFNNames

FAMILY = Family(
    model_type="starcoder2",
    names=FFNNames(up="c_fc", down="c_proj"),
    attention=Attention(qkv_bias="use_bias", o_bias="use_bias"),
    ffn_bias="use_bias",
)
