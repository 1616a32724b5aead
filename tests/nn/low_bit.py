"""Low-bit copies of weights by the rule, for tests: quantise, pack and decode with plain loops over a block.

Axes: P neurons, D model width, B bytes of a row, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantised(w_PD: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [P, D], scale and offset [P, G] in bf16, from the range of each group."""
    neurons, d_model = w_PD.shape
    groups = -(-d_model // group)
    codes_PD = torch.zeros(neurons, d_model, dtype=torch.uint8)
    scale_PG = torch.zeros(neurons, groups, dtype=torch.bfloat16)
    offset_PG = torch.zeros(neurons, groups, dtype=torch.bfloat16)
    for g in range(groups):
        own = w_PD[:, g * group : (g + 1) * group].float()
        low, high = own.amin(1), own.amax(1)
        scale_PG[:, g], offset_PG[:, g] = (high - low).clamp(min=1e-8) / (2**bits - 1), low
        steps = (own - offset_PG[:, g, None].float()) / scale_PG[:, g, None].float()
        codes_PD[:, g * group : (g + 1) * group] = steps.round().clamp(0, 2**bits - 1).to(torch.uint8)
    return codes_PD, scale_PG, offset_PG


def packed(codes_PD: Tensor, bits: int) -> Tensor:
    """Bytes [P, B] of the codes: blocks of 64 weights, the last filled up with 0."""
    neurons, d_model = codes_PD.shape
    blocks = -(-d_model // 64)
    padded = torch.zeros(neurons, blocks * 64, dtype=torch.uint8)
    padded[:, :d_model] = codes_PD
    out = torch.zeros(neurons, blocks, 8 * bits, dtype=torch.uint8)
    for w in range(64):
        code = padded.view(neurons, blocks, 64)[:, :, w]
        if bits == 4:
            half, within = divmod(w, 32)
            out[:, :, 16 * half + within % 16] |= code << 4 * (within // 16)
        else:
            out[:, :, w % 16] |= (code & 3) << 2 * (w // 16)
            if bits == 3:
                out[:, :, 16 + w // 8] |= (code >> 2) << w % 8
    return out.flatten(1)


def decoded(codes_PD: Tensor, scale_PG: Tensor, offset_PG: Tensor, group: int) -> Tensor:
    """The router's weights [P, D] in float64."""
    d_model = codes_PD.shape[1]

    def spread(of_PG: Tensor) -> Tensor:
        return of_PG.double().repeat_interleave(group, dim=1)[:, :d_model]

    return spread(scale_PG) * codes_PD + spread(offset_PG)
