"""The `moesaic` architecture: activations that are more than a name of transformers (see `modeling_moesaic.py`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


class Scaled(nn.Module):
    """outer act(inner x): the constants that an FFN multiplies its gate and its output by."""

    def __init__(self, act: nn.Module, inner: float, outer: float) -> None:
        super().__init__()
        self.act, self.inner, self.outer = act, inner, outer

    def forward(self, x: Tensor) -> Tensor:
        return self.outer * self.act(self.inner * x)


def build_activation(name: str) -> nn.Module:
    """The activation called `silu`, or `silu(inner,outer)`; xIELU has tensors of its own."""
    plain, _, constants = name.removesuffix(")").partition("(")
    act = ACT2FN[plain].to(torch.get_default_dtype())  # xIELU's tensors would be bf16 in every model
    if not constants:
        return act
    inner, outer = map(float, constants.split(","))
    return Scaled(act, inner, outer)
