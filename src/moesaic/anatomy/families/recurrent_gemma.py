"""RecurrentGemma (Griffin): gated, GELU, biases; linear recurrences in most layers. Its width counts gate and up."""

from moesaic.anatomy.base import Family

FAMILY = Family(
    model_type="recurrent_gemma",
    ffn="mlp_block",
    activation="hidden_activation",
    d_ff_of=lambda config: config["intermediate_size"] // 2,
    ffn_bias=True,
    beyond_stock="linear recurrences in most layers",
)
