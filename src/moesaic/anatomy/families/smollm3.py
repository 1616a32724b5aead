"""SmolLM3: Llama's layout, some layers without rotary position."""

from moesaic.anatomy.base import Attention, Family

FAMILY = Family(
    model_type="smollm3",
    attention=Attention(qkv_bias="attention_bias", o_bias="attention_bias"),
    ffn_bias="mlp_bias",
    beyond_stock="layers without rotary position",
)
