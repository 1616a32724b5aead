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


class Clamped(nn.Module):
    """gpt-oss: x sigmoid(alpha x) of gates up to a limit; up projections are clamped on both sides, plus 1."""

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(max=self.limit)
        return x * torch.sigmoid(self.alpha * x)

    def up(self, x: Tensor) -> Tensor:
        return x.clamp(-self.limit, self.limit) + 1


def gated(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up, or what the activation makes of up in place of it."""
    gate, up = act(gate), act.up(up) if isinstance(act, Clamped) else up
    return gate * up if torch.is_grad_enabled() else gate.mul_(up)


def build_activation(name: str) -> nn.Module:
    """The activation called `silu`, `silu(inner,outer)` or `clamped(alpha,limit)`; xIELU has tensors of its own."""
    plain, _, constants = name.removesuffix(")").partition("(")
    numbers = [float(number) for number in constants.split(",") if number]
    if plain == "clamped":
        return Clamped(*numbers)
    act = ACT2FN[plain].to(torch.get_default_dtype())  # xIELU's tensors would be bf16 in every model
    return Scaled(act, *numbers) if numbers else act
