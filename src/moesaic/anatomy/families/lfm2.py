"""LFM2: gated, always SiLU; most layers have a short convolution in place of attention. The FFN's width is computed."""

from moesaic.anatomy.base import Config, Family, FFNNames


def _width(config: Config) -> int:
    width = config.get("block_ff_dim") or config["intermediate_size"]
    if not config.get("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    factor, multiple = config.get("block_ffn_dim_multiplier", 1.0), config.get("block_multiple_of", 256)
    return -(-int(factor * width) // multiple) * multiple


FAMILY = Family(
    model_type="lfm2",
    ffn="feed_forward",
    names=FFNNames(gate="w1", up="w3", down="w2"),
    activation=None,
    activation_of=lambda _: "silu",
    d_ff_of=_width,
    beyond_stock="short convolutions in place of attention",
)
