"""Falcon 7B, 40B and 180B: ungated, GELU, attention and FFN mostly in parallel, positions by RoPE or ALiBi."""

from moesaic.anatomy.base import Config, Family, FFNNames


def _width(config: Config) -> int:
    return 4 * config["hidden_size"] if config.get("ffn_hidden_size") is None else config["ffn_hidden_size"]


FAMILY = Family(
    model_type="falcon",
    layers="transformer.h",
    names=FFNNames(up="dense_h_to_4h", down="dense_4h_to_h"),
    d_ff="ffn_hidden_size",
    activation="activation",
    activation_of=lambda config: config.get("activation") or "gelu",
    d_ff_of=_width,
    prefix="transformer",
    layers_return_tuples=True,
)
