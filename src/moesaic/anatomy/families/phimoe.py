"""Phi-3.5-MoE: Mixtral's experts; on disk the router is called ``gate``."""

from dataclasses import replace

from moesaic.anatomy.families import mixtral

FAMILY = replace(
    mixtral.FAMILY, model_type="phimoe", renames=((".block_sparse_moe.", ".mlp."), (".mlp.gate.", ".mlp.router."))
)
