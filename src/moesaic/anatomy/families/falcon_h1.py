"""Falcon-H1: gated, with factors on the gate and on the output; Mamba beside attention in every layer."""

from moesaic.anatomy.base import Config, Family


def _activation(config: Config) -> str:
    """SiLU with the factors: d act(g gate) up, where the model has the factor d of the output behind it."""
    act, factors = config.get("hidden_act", "silu"), config.get("mlp_multipliers")
    if factors in (None, [1, 1]):
        return act
    gate, down = map(float, factors)
    return f"{act}({gate!r},{down!r})"


def _refuse(config: Config) -> str | None:
    scaled = (config.get("mlp_multipliers") or [1, 1])[1] != 1
    return "it multiplies biases of its FFN (mlp_bias, mlp_multipliers)" if config.get("mlp_bias") and scaled else None


FAMILY = Family(
    model_type="falcon_h1",
    ffn="feed_forward",
    activation=None,
    activation_of=_activation,
    refuse=_refuse,
    layers_return_tuples=True,
    ffn_bias="mlp_bias",
    beyond_stock="Mamba beside attention, with multipliers everywhere",
)
