"""Qwen3-Next: Qwen2-MoE's experts; most layers have linear attention, the others a gate on their output."""

from dataclasses import replace

from moesaic.anatomy.families import qwen2_moe

FAMILY = replace(qwen2_moe.FAMILY, model_type="qwen3_next")
