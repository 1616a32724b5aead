"""Magnitude sparsity inside one branch of an FFN: exact counts, deterministic ties.

Axes: D model width, M neurons of the branch, R rows thinned alike, N entries that compete.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["matrix", "row", "branch"]


def smallest(values_RN: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` entries of smallest magnitude in every row; of equal magnitudes the earlier ones.

    Selection by k-th value, not by sorting: linear in N. bf16 and fp16 are compared in fp32, which is exact.
    """
    if count == 0:
        return torch.zeros_like(values_RN, dtype=torch.bool)
    magnitude_RN = values_RN.abs()
    if magnitude_RN.dtype in (torch.bfloat16, torch.float16):
        magnitude_RN = magnitude_RN.float()
    threshold_R1 = magnitude_RN.kthvalue(count, dim=1, keepdim=True).values
    below_RN = magnitude_RN < threshold_R1
    equal_RN = magnitude_RN == threshold_R1
    room_R1 = count - below_RN.sum(dim=1, keepdim=True)
    return below_RN | (equal_RN & (equal_RN.cumsum(dim=1) <= room_R1))


def fade_branch(
    gate_MD: Tensor | None,
    up_MD: Tensor,
    down_DM: Tensor,
    fraction: float,
    scope: Scope = "matrix",
    real_M: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Copies of a branch's matrices with the ``floor(fraction * numel)`` smallest magnitudes set to zero.

    Args:
        gate_MD: Gate rows, or None for an ungated FFN.
        up_MD: Up rows.
        down_DM: Down columns.
        fraction: s in [0, 1].
        scope: What competes: each ``matrix`` slice, each ``row`` of each slice (rows of ``down`` have M entries), or
            the pooled slices of the ``branch``.
        real_M: False for padding neurons. They neither count nor compete. All are real by default.

    Source: MLPMoE (arXiv 2511.21089), Fractal Fade; criterion and scopes are our reading [OURS].
    """
    if real_M is not None and not bool(real_M.all()):
        return _fade_padded(gate_MD, up_MD, down_DM, fraction, scope, real_M)
    parts = [part for part in (gate_MD, up_MD, down_DM) if part is not None]
    if scope == "branch":
        flat_1N = torch.cat([part.reshape(1, -1) for part in parts], dim=1)
        mask_1N = smallest(flat_1N, math.floor(fraction * flat_1N.shape[1]))
        masks = [m.view_as(p) for m, p in zip(mask_1N.split([p.numel() for p in parts], dim=1), parts, strict=True)]
    else:
        masks = [_mask(part, fraction, scope) for part in parts]
    faded = [part.masked_fill(mask, 0) for part, mask in zip(parts, masks, strict=True)]
    return (None if gate_MD is None else faded[0]), faded[-2], faded[-1]


def _mask(part: Tensor, fraction: float, scope: Scope) -> Tensor:
    rows_RN = part if scope == "row" else part.reshape(1, -1)
    return smallest(rows_RN, math.floor(fraction * rows_RN.shape[1])).view_as(part)


def _fade_padded(
    gate_MD: Tensor | None, up_MD: Tensor, down_DM: Tensor, fraction: float, scope: Scope, real_M: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    gate = None if gate_MD is None else gate_MD[real_M]
    gate, up, down = fade_branch(gate, up_MD[real_M], down_DM[:, real_M], fraction, scope)
    up_out, down_out = torch.zeros_like(up_MD), torch.zeros_like(down_DM)
    up_out[real_M], down_out[:, real_M] = up, down
    if gate is None or gate_MD is None:
        return None, up_out, down_out
    gate_out = torch.zeros_like(gate_MD)
    gate_out[real_M] = gate
    return gate_out, up_out, down_out
