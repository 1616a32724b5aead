"""Gemma 2: as Gemma 1, with norms before and after attention and FFN, and soft-capped logits."""

from dataclasses import replace

from moesaic.anatomy.families import gemma

FAMILY = replace(
    gemma.FAMILY,
    model_type="gemma2",
    group="gemma",
    activation_of=lambda config: config.get("hidden_activation") or gemma.TANH_GELU,
    norms="both",
    beyond_stock="GELU experts, norms on both sides of the FFN, and soft-capped logits",
)
