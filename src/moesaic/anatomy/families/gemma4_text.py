"""Gemma 4 (text model): as Gemma 2, with norms on queries, keys and values, and layers scaled as a whole.

Its small sizes read a further embedding in every layer, and layers of theirs share keys and values: these cannot be run
layer by layer over all windows, as calibration does.
"""

from dataclasses import replace

from moesaic.anatomy.base import Config
from moesaic.anatomy.families import gemma2


def _refuse(config: Config) -> str | None:
    if config.get("enable_moe_block"):
        return "its layers have experts beside the FFN (enable_moe_block)"
    if config.get("hidden_size_per_layer_input", 256):
        return "each of its layers reads an embedding of its own (hidden_size_per_layer_input)"
    if config.get("num_kv_shared_layers"):
        return "some of its layers read the keys and values of others (num_kv_shared_layers)"
    return None


FAMILY = replace(
    gemma2.FAMILY,
    model_type="gemma4_text",
    attention=None,
    refuse=_refuse,
    beyond_stock="GELU experts, norms on both sides of the FFN, and layers that are scaled as a whole",
)
