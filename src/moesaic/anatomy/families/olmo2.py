"""OLMo 2: gated, SiLU, norms after attention and FFN, and over all heads' queries and keys."""

from moesaic.anatomy.base import Attention, Family

FAMILY = Family(
    model_type="olmo2",
    attention=Attention(qk_norm="full", qkv_bias="attention_bias", o_bias="attention_bias"),
    norms="after",
)
