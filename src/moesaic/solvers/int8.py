"""An FFN in int8, whose high halves route: how its three matrices are rounded, and how they lie.

A neuron's row of gate and of up and its column of down are rounded alike, in groups of ``group`` weights along D: with
the largest magnitude m of a group, the scale is m / 127 rounded to bf16, and a code is q = round(w / scale) in
[-127, 127]. So a weight is off by at most half a scale. q + 128 = 16 high + low; 16 high - 120, the middle of what high
leaves open, times the scale is what a router reads.

* ``router.gate_codes``, ``router.up_codes``, uint8 [F, B]: high, packed as :mod:`moesaic.solvers.low_bit` says for 4
  bits. ``router.gate_scale``, ``router.up_scale``, bfloat16 [F, G].
* ``rest.codes``, uint8 [F, 2 B + P] (without a gate [F, B + P]): what is read of a chosen neuron, side by side. low of
  gate, low of up, packed in the same way, then q of down in two's complement, filled with 0 up to P.
  ``rest.scale``, bfloat16 [F, G]: of down.

Axes: F neurons, D model width, P padded to whole blocks of 64, B = P / 2 bytes of packed halves, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.blueprint.shape import BLOCK, row_groups
from moesaic.solvers.low_bit import pack_codes


def int8_tensors(gate_FD: Tensor | None, up_FD: Tensor, down_DF: Tensor, group: int) -> dict[str, Tensor]:
    """The matrices by the names above, contiguous.

    Args:
        gate_FD, up_FD, down_DF: Any floating dtypes; without a gate None.
        group: Weights that share a scale; the last group of a row may be shorter.
    """
    made, low_halves = {}, []
    for name, matrix_FD in (("gate", gate_FD), ("up", up_FD)):
        if matrix_FD is not None:
            codes_FD, made[f"router.{name}_scale"] = symmetric(matrix_FD, group)
            biased_FD = codes_FD.to(torch.int16) + 128
            made[f"router.{name}_codes"] = pack_codes(biased_FD >> 4, 4)
            low_halves.append(pack_codes(biased_FD & 15, 4))
    down_FD, made["rest.scale"] = symmetric(down_DF.T, group)
    down_FP = F.pad(down_FD, (0, -down_FD.shape[1] % BLOCK)).view(torch.uint8)
    return made | {"rest.codes": torch.cat([*low_halves, down_FP], dim=1)}


def symmetric(matrix_FD: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [F, D] and scales bfloat16 [F, G] of rows of weights."""
    width = matrix_FD.shape[1]
    padded_FP = F.pad(matrix_FD.float(), (0, row_groups(width, group) * group - width))
    weight_FGM = padded_FP.unflatten(1, (-1, group))
    scale_FG = (weight_FGM.abs().amax(dim=2) / 127).bfloat16()
    codes_FGM = (weight_FGM / scale_FG.float().clamp(min=1e-30)[:, :, None]).round_().clamp_(-127, 127)
    return codes_FGM.to(torch.int8).flatten(1)[:, :width].contiguous(), scale_FG
