"""Granite 3 (MoE): Granite's multipliers; on disk all experts of a layer are one tensor, gate and up in it."""

from moesaic.anatomy.base import Family, FFNNames, MoENames

FAMILY = Family(
    model_type="granitemoe",
    renames=(
        (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
        (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
        (".block_sparse_moe.router.layer.", ".block_sparse_moe.router."),
    ),
    multipliers=True,
    moe=MoENames(
        "num_local_experts",
        "intermediate_size",
        block="block_sparse_moe",
        names=FFNNames(up="input_linear", down="output_linear", fused=True, stacked=True),
    ),
)
