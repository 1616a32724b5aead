"""DiffLlama: gated, SiLU; attention is the difference of two."""

from moesaic.anatomy.base import Family

FAMILY = Family(model_type="diffllama", beyond_stock="attention that is the difference of two")
