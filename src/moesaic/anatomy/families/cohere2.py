"""Cohere Command R7B and A: as Command R; layers without window have no RoPE."""

from dataclasses import replace

from moesaic.anatomy.families import cohere

FAMILY = replace(cohere.FAMILY, model_type="cohere2")
