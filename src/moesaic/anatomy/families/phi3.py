"""Phi-3, Phi-3.5 and Phi-4: gated, SiLU; gate and up in one matrix, gate first; query, key and value in one too."""

from moesaic.anatomy.base import Attention, Family, FFNNames

FAMILY = Family(
    model_type="phi3",
    names=FFNNames(up="gate_up_proj", down="down_proj", fused=True),
    attention=Attention(fused=True),
)
