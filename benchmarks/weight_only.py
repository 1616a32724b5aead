"""torch's own products with weights of 8 and 4 bits, as what a user of a CPU would take instead of experts.

Axes: T tokens, N rows, D width of the input, G groups.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

GROUP = 64


class Int8Linear(nn.Module):
    """A bf16 layer whose weights are symmetric int8, a scale per row (`torch._weight_int8pack_mm`)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight_ND = layer.weight.detach().float()
        scale_N1 = weight_ND.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        self.codes_ND, self.scale_N = (weight_ND / scale_N1).round().to(torch.int8), scale_N1[:, 0].bfloat16()
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y_TN = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self.codes_ND, self.scale_N)
        y = y_TN.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int4Linear(nn.Module):
    """A bf16 layer whose weights are 4 bits, scale and zero per group of 64 (`torch._weight_int4pack_mm_for_cpu`)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight_NGg = layer.weight.detach().float().unflatten(1, (-1, GROUP))
        least_NG, most_NG = weight_NGg.amin(2), weight_NGg.amax(2)
        scale_NG = ((most_NG - least_NG) / 15).clamp(min=1e-8)
        codes_NGg = ((weight_NGg - least_NG[..., None]) / scale_NG[..., None]).round().clamp(0, 15)
        self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NGg.flatten(1).int(), 1)
        middle_NG = least_NG + 8 * scale_NG  # torch decodes (code - 8) * scale + zero
        self.scale_and_zero = torch.stack([scale_NG, middle_NG], dim=2).transpose(0, 1).bfloat16().contiguous()
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        y_TN = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TD, self.codes, GROUP, self.scale_and_zero)
        y = y_TN.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


WEIGHT_ONLY: dict[str, type[Int8Linear] | type[Int4Linear]] = {"int8": Int8Linear, "int4": Int4Linear}


def quantised(model: nn.Module, kind: str, keep: tuple[str, ...] = ()) -> nn.Module:
    """A copy with every linear layer replaced, but for those whose names end with one of ``keep``."""
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not path.endswith(keep or ("\0",)):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, WEIGHT_ONLY[kind](layer))
    return model
