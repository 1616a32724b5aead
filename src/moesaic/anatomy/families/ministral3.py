"""Ministral 3: gated, SiLU, no biases; queries grow with their position, as in Llama 4."""

from moesaic.anatomy.base import Family

FAMILY = Family(model_type="ministral3", beyond_stock="queries that are scaled by their position")
