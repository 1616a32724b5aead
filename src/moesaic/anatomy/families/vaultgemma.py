"""VaultGemma: as Gemma 2, without the norms after attention and FFN."""

from dataclasses import replace

from moesaic.anatomy.families import gemma2

FAMILY = replace(
    gemma2.FAMILY,
    model_type="vaultgemma",
    norms="before",
    beyond_stock="GELU experts, norms with 1 + w, and soft-capped logits",
)
