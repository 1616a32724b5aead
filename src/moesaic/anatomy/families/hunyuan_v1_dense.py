"""Hunyuan dense: gated, SiLU; queries and keys are normed after RoPE, which other families do before."""

from moesaic.anatomy.base import Family

FAMILY = Family(model_type="hunyuan_v1_dense", beyond_stock="norms of queries and keys after RoPE")
