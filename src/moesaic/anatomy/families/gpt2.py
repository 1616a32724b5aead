"""GPT-2: ungated, tanh GELU, biases, matrices stored [in, out]."""

from moesaic.anatomy.base import Config, Family, FFNNames


def _width(config: Config) -> int:
    return 4 * config["n_embd"] if config.get("n_inner") is None else config["n_inner"]


def _refuse(config: Config) -> str | None:
    return "its cross-attention makes it part of another model" if config.get("add_cross_attention") else None


FAMILY = Family(
    model_type="gpt2",
    layers="transformer.h",
    names=FFNNames(up="c_fc", down="c_proj", transposed=True),
    d_model="n_embd",
    d_ff="n_inner",
    num_layers="n_layer",
    heads="n_head",
    activation="activation_function",
    d_ff_of=_width,
    prefix="transformer",
    buffers=(".attn.bias", ".attn.masked_bias"),
    refuse=_refuse,
)
