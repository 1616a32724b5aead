"""A matrix in a few bits: codes with a scale and an offset per group of weights along a row, packed into bytes.

A weight is scale * code + offset. Codes of a row are padded with 0 to a multiple of 64, and each block of 64 weights
w_0 .. w_63 is packed so that a vector register of 16 codes needs a shift and a mask:

* 4 bits, 32 bytes: byte 16 h + j (h = 0, 1; j = 0 .. 15) has the code of w_(32 h + j) in its low half and that of
  w_(32 h + 16 + j) in its high half.
* 3 bits, 24 bytes: byte j has the low two bits of the codes of w_j, w_(16 + j), w_(32 + j), w_(48 + j), the first in
  its lowest bits; byte 16 + m (m = 0 .. 7) has the third bits of w_(8 m) .. w_(8 m + 7), the first in its lowest bit.
* 2 bits, 16 bytes: the first 16 of these.

The runtime reads them (:mod:`moesaic.nn.moesaic_low_bit`).

Axes: F rows, D weights of a row, P padded to whole blocks, G groups, N blocks, B bytes of a row, M weights of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.blueprint.shape import BLOCK, row_groups

_SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Widths of the grid that are tried, over the range of the group's weights."""
_ROWS = 1024  # quantised at a time: bounds the memory


def low_bit(matrix_FD: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes uint8 [F, B], scales and offsets bfloat16 [F, G] that are nearest to a matrix.

    Of each group, grids from its smallest to its largest weight, and narrower ones about their middle, are tried; that
    of least squared error is taken. Codes are chosen with the rounded scale and offset [OURS].

    Args:
        matrix_FD: Any floating dtype.
        bits: 2, 3 or 4.
        group: Weights that share a scale and an offset; the last group of a row may be shorter.
    """
    parts = [_rows(rows_MD, bits, group) for rows_MD in matrix_FD.split(_ROWS)]
    codes_FD, scale_FG, offset_FG = (torch.cat(part) for part in zip(*parts, strict=True))
    return pack_codes(codes_FD, bits), scale_FG, offset_FG


def pack_codes(codes_FD: Tensor, bits: int) -> Tensor:
    """Codes, integers in [0, 2^bits), as packed bytes uint8 [F, B]."""
    codes_FP = F.pad(codes_FD.to(torch.uint8), (0, -codes_FD.shape[1] % BLOCK))
    codes_FNq = codes_FP.unflatten(1, (-1, 4, 16))  # four runs of 16 weights in a block
    if bits == 4:
        low, high = codes_FNq[:, :, 0::2], codes_FNq[:, :, 1::2]
        return (low | high << 4).flatten(1).contiguous()
    two = codes_FNq & 3
    packed = two[:, :, 0] | two[:, :, 1] << 2 | two[:, :, 2] << 4 | two[:, :, 3] << 6
    if bits == 3:
        third_FNm8 = (codes_FP >> 2).unflatten(1, (-1, 8, 8))
        shift_8 = torch.arange(8, dtype=torch.uint8, device=codes_FD.device)
        packed = torch.cat([packed, (third_FNm8 << shift_8).sum(dim=3, dtype=torch.uint8)], dim=2)
    return packed.flatten(1).contiguous()


def _rows(matrix_FD: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [F, D], scale and offset bfloat16 [F, G]."""
    d_model = matrix_FD.shape[1]
    groups, top = row_groups(d_model, group), 2**bits - 1
    # A shorter last group is filled with its own last weight, which changes neither end of its range.
    filled_FGM = F.pad(matrix_FD.float()[None], (0, groups * group - d_model), mode="replicate")[0].unflatten(
        1, (groups, group)
    )
    real_GM = (torch.arange(groups * group, device=matrix_FD.device) < d_model).view(groups, group)
    least_FG, most_FG = filled_FGM.amin(dim=2), filled_FGM.amax(dim=2)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    error_FG = torch.full_like(least_FG, float("inf"))
    for shrink in _SHRINK:
        margin_FG = (1 - shrink) / 2 * (most_FG - least_FG)
        offset_FG = (least_FG + margin_FG).bfloat16()
        scale_FG = ((most_FG - least_FG - 2 * margin_FG) / top).clamp(min=2.0**-100).bfloat16()
        step_FG1, start_FG1 = scale_FG.float()[:, :, None], offset_FG.float()[:, :, None]
        codes_FGM = ((filled_FGM - start_FG1) / step_FG1).round_().clamp_(0, top)
        now_FG = ((step_FG1 * codes_FGM + start_FG1 - filled_FGM).square_() * real_GM).sum(dim=2)
        better_FG = now_FG < error_FG
        error_FG = torch.where(better_FG, now_FG, error_FG)
        found = codes_FGM.to(torch.uint8), scale_FG, offset_FG
        if best is None:
            best = found
        else:
            codes_FGM = torch.where(better_FG[:, :, None], found[0], best[0])
            best = codes_FGM, torch.where(better_FG, scale_FG, best[1]), torch.where(better_FG, offset_FG, best[2])
    assert best is not None
    return best[0].flatten(1)[:, :d_model], best[1], best[2]
