"""Qwen3.5 (text model): gated, SiLU; most layers have linear attention, the others a gate on their output."""

from moesaic.anatomy.base import Family

FAMILY = Family(model_type="qwen3_5_text", beyond_stock="linear attention in most layers")
