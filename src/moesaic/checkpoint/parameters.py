"""How many parameters a checkpoint folder has: the one count that every command shows. No weights are read for it.

Parameters are the numbers of the FFNs and of the rest of the model, a tied head once, int8 weights like others. Routers
count, but for those that are copies of the FFN's own weights (:data:`moesaic.blueprint.shape.COPIES`): nothing in them
is new, so they are said as bytes. Buffers, as transformers calls them, are no parameters: tables, masks, biases for
choosing only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moesaic.blueprint.shape import COPIES
from moesaic.checkpoint.converted import read_dense_anatomy
from moesaic.checkpoint.head import repeated_head
from moesaic.checkpoint.reader import Checkpoint

_BUFFERS = (
    ".selection_bias",
    ".e_score_correction_bias",
    ".act_fn.beta",  # of xIELU
    ".act_fn.eps",
    ".rotary_emb.inv_freq",  # this and the masks: in old files
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)


def count_parameters(checkpoint: Checkpoint) -> int:
    """Of a folder, dense or converted; of a multimodal model those of its text model."""
    sites: Mapping[str, Any] = checkpoint.config.get("ffn_sites", {})
    int8 = {path: spec for path, spec in sites.items() if spec.get("weights") == "int8"}
    left_out = tuple(f"{path}.router." for path, spec in sites.items() if spec["router"] in COPIES)
    left_out += tuple(f"{path}.rest." for path in int8)
    head = repeated_head(checkpoint)
    found = sum(
        math.prod(checkpoint.info(name).shape)
        for name in checkpoint.names
        if name != head
        and "float" in checkpoint.info(name).dtype
        and not name.startswith(left_out)
        and not name.endswith(_BUFFERS)
    )
    if not int8:
        return found
    anatomy = read_dense_anatomy(checkpoint)
    return found + sum(spec["neurons"] for spec in int8.values()) * anatomy.d_model * (3 if anatomy.gated else 2)
