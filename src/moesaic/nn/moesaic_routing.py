"""The `moesaic` architecture: what decides in fp32 (see `modeling_moesaic.py`).

Axes: T tokens, D model width, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .moesaic_activation import gated


class KeptAsStored(nn.Module):
    """A module whose tensors stay as they are under .to(bfloat16), .half(), .double(): decisions would be others."""

    def kept(self) -> dict[str, Tensor]:
        """The tensors that keep their dtype: by default all buffers that are the module's own."""
        return dict(self.named_buffers(recurse=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: tensor.data for name, tensor in self.kept().items()}
        super()._apply(fn, recurse)
        for name, tensor in self.kept().items():
            if tensor.dtype != before[name].dtype:
                tensor.data = before[name].to(tensor.device)
        return self


class KeptInFloat32(nn.Module):
    """A module that stays in fp32 under .to(bfloat16), .half(), .double(): rounded decisions would be others."""

    def decisive(self) -> dict[str, Tensor]:
        """The tensors that stay: by default all that are the module's own."""
        return dict(self.named_parameters(recurse=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: tensor.data for name, tensor in self.decisive().items()}
        super()._apply(fn, recurse)
        for name, tensor in self.decisive().items():
            if tensor.dtype != torch.float32:
                tensor.data = before[name].to(tensor.device)
        return self


class Router(KeptInFloat32):
    """Scores experts in fp32.

    `linear`: W x + b. `low_rank`: W (R x) + b with R of `router_rank` rows. `gated`: |(W_u x + b_u) act(W_g x + b_g)|,
    or |act(W_u x + b_u)| where there is no W_g.
    """

    def __init__(self, spec: dict[str, Any], d_model: int) -> None:
        super().__init__()
        self.kind = spec["router"]
        self.normalise_input = spec["normalise_input"]
        self.weight: Tensor
        self.reduce: Tensor
        self.bias: Tensor | None
        self.up: Tensor
        self.gate: Tensor | None
        self.up_bias: Tensor | None
        self.gate_bias: Tensor | None
        rank = spec.get("router_rank", d_model)
        for name in ("weight", "reduce", "bias", "up", "gate", "up_bias", "gate_bias"):
            rows = rank if name == "reduce" else spec["experts"]
            shape = (rows,) if name.endswith("bias") else (rows, rank if name == "weight" else d_model)
            present = name in spec["router_tensors"]
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32)) if present else None)

    def forward(self, x_TD: Tensor, act: nn.Module) -> Tensor:
        """Scores z_TE, fp32. `act`: the activation of the FFN that is routed."""
        if not x_TD.is_meta and torch.is_autocast_enabled(x_TD.device.type):
            with torch.autocast(x_TD.device.type, enabled=False):
                return self(x_TD, act)
        x_TD = x_TD.float()
        if self.normalise_input:
            x_TD = F.normalize(x_TD, dim=-1)
        if self.kind == "low_rank":
            x_TD = F.linear(x_TD, self.reduce)
        if self.kind in ("linear", "low_rank"):
            return F.linear(x_TD, self.weight, self.bias)
        up_TE = F.linear(x_TD, self.up, self.up_bias)
        if self.gate is None:
            return act(up_TE).abs()
        return gated(act, F.linear(x_TD, self.gate, self.gate_bias), up_TE).abs()
