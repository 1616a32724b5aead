"""OLMo 1: gated, SiLU, no biases in the FFN, norms without weights; queries, keys and values may be clipped."""

from moesaic.anatomy.base import Family

FAMILY = Family(model_type="olmo", beyond_stock="norms without weights")
