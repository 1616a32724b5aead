"""The `moesaic` architecture: the path that gives each expert its own tokens (see `moesaic_paths.py`).

Axes: T tokens, N tokens of one expert, D model width, E routed experts, K experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .moesaic_ffn import MoEFeedForward

ROWS_16_BIT = 16  # on a CPU, rows per expert in multiples of this: oneDNN compiles (0.5 ms) for every new number


class Sorted:
    """Each expert multiplies the tokens that chose it; idle experts cost nothing."""

    name = "sorted"

    def __init__(self, layout: str) -> None:
        self.layout = layout

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return ffn.routed and not x_TD.is_meta and not torch.compiler.is_compiling()

    def run(self, ffn: MoEFeedForward, x_TD: Tensor) -> Tensor:
        return by_expert(ffn, ffn.matrices(), x_TD, *ffn.choice(x_TD))


def by_expert(ffn: MoEFeedForward, matrices: Any, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """The shared expert of all tokens and each routed one of its own; ``matrices`` are what the FFN's methods take."""
    order = idx_TK.flatten().argsort(stable=True)
    counts = torch.bincount(idx_TK.flatten(), minlength=ffn.experts).tolist()
    tokens = order // idx_TK.shape[1]
    weights = None if weight_TK is None else weight_TK.flatten()[order]
    multiple = ROWS_16_BIT if x_TD.device.type == "cpu" and x_TD.dtype != torch.float32 else 1
    y_TD = ffn.rows(matrices, x_TD, 0, ffn.shared) if ffn.shared else torch.zeros_like(x_TD)
    begin = 0
    for e, count in enumerate(counts):
        if count == 0:
            continue
        # Rounding up takes in rows of a neighbouring expert; they are computed and dropped.
        rows = -(-count // multiple) * multiple
        first = max(0, min(begin, len(tokens) - rows))
        own = slice(begin - first, begin - first + count)
        part_ND = ffn.expert_rows(matrices, e, x_TD[tokens[first : first + rows]])[own]
        if weights is not None:
            part_ND = part_ND * weights[begin : begin + count, None]
        y_TD.index_add_(0, tokens[begin : begin + count], part_ND.to(y_TD.dtype))
        begin += count
    return y_TD
