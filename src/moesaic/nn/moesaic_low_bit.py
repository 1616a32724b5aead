"""The `moesaic` architecture: the FFN's own matrices in a few bits as the router (see `modeling_moesaic.py`).

A weight is scale * code + offset, with a scale and an offset per group of weights along a row. Codes are packed in
blocks of 64 weights w_0 .. w_63, the last one padded with 0:

* 4 bits, 32 bytes: byte 16 h + j (h = 0, 1; j = 0 .. 15) has w_(32 h + j) in its low half, w_(32 h + 16 + j) above.
* 3 bits, 24 bytes: byte j has the low two bits of w_j, w_(16 + j), w_(32 + j), w_(48 + j), from its lowest bits on;
  byte 16 + m (m = 0 .. 7) the third bits of w_(8 m) .. w_(8 m + 7), from its lowest bit on.
* 2 bits, 16 bytes: the first 16 of these.

Axes: T tokens, D model width, F neurons, B bytes of a packed row, G groups of a row, N blocks of a row.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .moesaic_activation import gated
from .moesaic_kept import kept
from .moesaic_routing import KeptAsStored

BLOCK = 64


def unpack_codes(codes_FB: Tensor, bits: int) -> Tensor:
    """Codes uint8 [F, 64 N] of packed rows."""
    bytes_FNb = codes_FB.unflatten(1, (-1, BLOCK * bits // 8))
    if bits == 4:
        halves = bytes_FNb.unflatten(2, (2, 16))
        return torch.stack([halves & 15, halves >> 4], dim=3).flatten(1)
    low = bytes_FNb[:, :, :16]
    codes_FP = torch.stack([low >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)
    if bits == 3:
        high = bytes_FNb[:, :, 16:]
        codes_FP = codes_FP | torch.stack([high >> shift & 1 for shift in range(8)], dim=3).flatten(1) << 2
    return codes_FP


def decode(codes_FB: Tensor, scale_FG: Tensor, offset_FG: Tensor, bits: int, group: int, d_model: int) -> Tensor:
    """The matrix that they stand for, fp32 [F, D]."""
    codes_FP = F.pad(unpack_codes(codes_FB, bits), (0, scale_FG.shape[1] * group - codes_FB.shape[1] * 8 // bits))
    codes_FGM = codes_FP.unflatten(1, (-1, group)).float()
    return torch.addcmul(offset_FG.float()[:, :, None], codes_FGM, scale_FG.float()[:, :, None]).flatten(1)[:, :d_model]


def best_scored(score_TF: Tensor, count: int) -> Tensor:
    """The ``count`` of largest score in each row, of equal ones the earlier, bool [T, F]."""
    if count > 0 and _on_few_cores(score_TF):
        best_TF = score_TF >= torch.from_numpy(np.partition(score_TF.numpy(), -count, axis=-1)[:, -count, None])
        if bool((best_TF.sum(dim=-1) == count).all()):  # neither equal scores nor any that is no number
            return best_TF
    least_T1 = score_TF.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above_TF, equal_TF = score_TF > least_T1, score_TF == least_T1
    room_T1 = count - above_TF.sum(dim=-1, keepdim=True)
    return above_TF | (equal_TF & (equal_TF.cumsum(dim=-1) <= room_T1))


def _on_few_cores(score_TF: Tensor) -> bool:
    """Whether numpy selects: one core of it takes a seventh of the time that one core of torch takes.

    What numpy does is not seen by tracing, gradients or transforms such as `torch.vmap`.
    """
    plain = type(score_TF) is Tensor and score_TF.device.type == "cpu" and score_TF.dtype == torch.float32
    if not plain or score_TF.requires_grad or torch.compiler.is_compiling() or torch.get_num_threads() > 4:
        return False
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return not traced and not functorch.is_functorch_wrapped_tensor(score_TF)


class LowBitRouter(KeptAsStored):
    """Scores neurons in fp32: |act(G x + b_g) (U x + b_u)| norm, or |act(U x + b_u)| norm without a gate.

    G and U are low-bit copies of the FFN's own matrices, the biases are the FFN's own, and `norm` is the length of a
    neuron's column of the dense down projection. Chosen are so many of largest score, of equal ones those that come
    first; or, where there is a `threshold`, all that reach it.

    Nothing here is trained. All tensors keep their dtype: codes uint8, scales and offsets bfloat16, the rest fp32.
    """

    of_group: ClassVar[tuple[str, ...]] = ("scale", "offset")

    def __init__(self, spec: dict[str, Any], d_model: int) -> None:
        super().__init__()
        self.bits, self.group = spec["router_bits"], spec["router_group"]
        self.d_model = d_model
        neurons = spec["experts"]
        row, groups = -(-d_model // BLOCK) * BLOCK * self.bits // 8, -(-d_model // self.group)
        self.gated = spec["gated"]
        self.gate_codes: Tensor
        self.gate_scale: Tensor
        self.up_codes: Tensor
        self.up_scale: Tensor
        for part in ("up", "gate") if self.gated else ("up",):
            self.register_buffer(f"{part}_codes", torch.zeros(neurons, row, dtype=torch.uint8))
            for name in self.of_group:
                self.register_buffer(f"{part}_{name}", torch.zeros(neurons, groups, dtype=torch.bfloat16))
        self.norm: Tensor
        self.threshold: Tensor | None
        self.register_buffer("norm", torch.zeros(neurons, dtype=torch.float32))
        found = "threshold" in spec["router_tensors"]
        self.register_buffer("threshold", torch.zeros(1, dtype=torch.float32) if found else None)

    def matrix(self, part: str) -> Tensor:
        """The low-bit copy of `up` or `gate`, fp32 [F, D]."""
        codes_FB, scale_FG, offset_FG = (getattr(self, f"{part}_{name}") for name in ("codes", "scale", "offset"))
        return decode(codes_FB, scale_FG, offset_FG, self.bits, self.group, self.d_model)

    @torch.no_grad()
    def forward(self, x_TD: Tensor, act: nn.Module, gate_bias_F: Tensor | None, up_bias_F: Tensor | None) -> Tensor:
        """Scores e_TF, fp32. `act`: the activation of the FFN that is routed."""
        if not x_TD.is_meta and torch.is_autocast_enabled(x_TD.device.type):
            with torch.autocast(x_TD.device.type, enabled=False):
                return self(x_TD, act, gate_bias_F, up_bias_F)
        up_TF = self._project(x_TD, "up", up_bias_F)
        h_TF = gated(act, self._project(x_TD, "gate", gate_bias_F), up_TF) if self.gated else act(up_TF)
        return h_TF.abs() * self.norm

    def _project(self, x_TD: Tensor, part: str, bias_F: Tensor | None) -> Tensor:
        matrix_FD = kept(self, part, len(x_TD), lambda: self.matrix(part))
        return F.linear(x_TD.float(), matrix_FD, None if bias_F is None else bias_F.float())

    def choose(self, score_TF: Tensor, top_k: int) -> Tensor:
        """Which neurons each token computes, bool [T, F]: so many, where no threshold says how many."""
        if self.threshold is not None:
            return score_TF >= self.threshold
        return best_scored(score_TF, top_k)
