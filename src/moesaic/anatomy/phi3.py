"""Phi-3, Phi-3.5 and Phi-4: gated, SiLU, gate and up in one matrix, gate first."""

from moesaic.anatomy.base import Family, FFNNames

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    layers="model.layers",
    ffn="mlp",
    names=FFNNames(up="gate_up_proj", down="down_proj", fused=True),
)
