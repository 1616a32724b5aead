"""Youtu-LLM: gated, SiLU, latent attention."""

from moesaic.anatomy.base import Family

FAMILY = Family(model_type="youtu", beyond_stock="latent attention")
