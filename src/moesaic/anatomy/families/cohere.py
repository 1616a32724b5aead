"""Cohere Command R: gated, SiLU, attention and FFN in parallel on one norm that takes off the mean."""

from moesaic.anatomy.base import Family

FAMILY = Family(model_type="cohere", beyond_stock="attention and FFN in parallel")
