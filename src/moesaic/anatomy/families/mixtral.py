"""Mixtral: already a MoE, every layer sparse. On disk the block is ``block_sparse_moe``, in the model ``mlp``."""

from moesaic.anatomy.base import Family, FFNNames, MoENames

_EXPERT = FFNNames(gate="w1", up="w3", down="w2")

FAMILY = Family(
    model_type="mixtral",
    names=_EXPERT,
    renames=((".block_sparse_moe.", ".mlp."),),
    moe=MoENames(
        block="mlp",
        names=_EXPERT,
        expert_count="num_local_experts",
        expert_width="intermediate_size",
    ),
)
