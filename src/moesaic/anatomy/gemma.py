"""Gemma 1 to 3 (text models): gated, tanh-approximated GELU, no biases."""

from moesaic.anatomy.base import GATED_PROJ, Config, Family

_TANH_GELU = "gelu_pytorch_tanh"


def _activation(config: Config) -> str:
    # Gemma 1 reads hidden_act, where its first releases say "gelu" and mean the tanh form. Later: hidden_activation.
    if config["model_type"] == "gemma":
        name = config.get("hidden_act") or _TANH_GELU
        return _TANH_GELU if name == "gelu" else name
    return config.get("hidden_activation") or _TANH_GELU


FAMILY = Family(
    name="gemma",
    model_types=("gemma", "gemma2", "gemma3_text"),
    layers="model.layers",
    ffn="mlp",
    names=GATED_PROJ,
    activation_of=_activation,
    norm_after=("gemma2", "gemma3_text"),
)
