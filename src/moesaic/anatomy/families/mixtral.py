"""Mixtral: already a MoE, every layer sparse. On disk the block is ``block_sparse_moe``, in the model ``mlp``."""

from moesaic.anatomy.base import Family, FFNNames, MoENames

FAMILY = Family(
    model_type="mixtral",
    renames=((".block_sparse_moe.", ".mlp."),),
    moe=MoENames("num_local_experts", "intermediate_size", names=FFNNames(gate="w1", up="w3", down="w2")),
)
