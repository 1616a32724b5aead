"""GPT-NeoX and Pythia: ungated, GELU, biases. Attention and FFN may run in parallel, which leaves the FFN as it is."""

from moesaic.anatomy.base import Family, FFNNames

FAMILY = Family(
    model_type="gpt_neox",
    layers="gpt_neox.layers",
    names=FFNNames(up="dense_h_to_4h", down="dense_4h_to_h"),
    prefix="gpt_neox",
    renames=(("embed_out.", "lm_head."),),
    buffers=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
