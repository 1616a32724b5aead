"""HyperCLOVA X SEED: Granite's multipliers, but logits are multiplied by theirs; norms may follow attention and FFN.

Whether they follow is a key of the config. Taking them for granted is right in both cases: nothing is then concluded
from the size of an FFN's output.
"""

from moesaic.anatomy.base import Family

FAMILY = Family(
    model_type="hyperclovax",
    norms="both",
    ffn_bias="mlp_bias",
    beyond_stock="norms on both sides of the FFN with multipliers",
)
