"""Mistral: gated, SiLU, no biases."""

from moesaic.anatomy.base import Attention, Family

FAMILY = Family(model_type="mistral", attention=Attention())
