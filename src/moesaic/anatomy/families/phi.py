"""Phi-1, Phi-1.5 and Phi-2: ungated, tanh GELU, biases, attention and FFN in parallel on one norm."""

from moesaic.anatomy.base import Family, FFNNames

FAMILY = Family(
    model_type="phi",
    names=FFNNames(up="fc1", down="fc2"),
)
