"""OLMo 3: as OLMo 2, with sliding windows in most layers, which have a RoPE of their own."""

from dataclasses import replace

from moesaic.anatomy.families import olmo2

FAMILY = replace(olmo2.FAMILY, model_type="olmo3", beyond_stock="a RoPE of its own in layers with a sliding window")
