"""StableLM 2 and 3B: gated, SiLU, norms that take off the mean; attention and FFN may run in parallel."""

from moesaic.anatomy.base import Family

FAMILY = Family(model_type="stablelm", beyond_stock="norms that take off the mean")
