"""MiniCPM3: gated, SiLU, latent attention; residuals are scaled by the depth of the model."""

import math

from moesaic.anatomy.base import Config, Family


def _residual(config: Config) -> float:
    depth = config.get("scale_depth", 1.4)
    return 1.0 if depth is None else depth / math.sqrt(config["num_hidden_layers"])


FAMILY = Family(
    model_type="minicpm3",
    ffn_bias="mlp_bias",
    residual_of=_residual,
    beyond_stock="latent attention with scaled residuals",
)
