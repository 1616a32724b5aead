"""Phi-1, Phi-1.5 and Phi-2: ungated, tanh GELU, biases, attention and FFN in parallel on one norm."""

from moesaic.anatomy.base import Family, FFNNames

FAMILY = Family(
    name="phi",
    model_types=("phi",),
    layers="model.layers",
    ffn="mlp",
    names=FFNNames(up="fc1", down="fc2"),
)
