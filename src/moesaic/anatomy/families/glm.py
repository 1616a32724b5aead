"""GLM-4 (the first): gate and up in one matrix, gate first; RoPE rotates neighbouring coordinates of half a head."""

from moesaic.anatomy.base import Attention, Family, FFNNames

FAMILY = Family(
    model_type="glm",
    names=FFNNames(up="gate_up_proj", down="down_proj", fused=True),
    attention=Attention(qkv_bias="attention_bias", head_dim=128, adjacent=True),
)
