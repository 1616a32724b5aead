"""The `moesaic` architecture: neuron experts in int8, whose high halves are the router (see `modeling_moesaic.py`).

The matrices are integers q in [-127, 127] times a bf16 scale per group of 64 weights of a neuron along D. Of gate and
up, q + 128 = 16 high + low. The router reads (16 high - 120) times the scale, which lies in the middle of what high
leaves open. Low halves and the down projection are needed of chosen neurons alone:

* `router`: high halves `gate_codes`, `up_codes` uint8 [F, B], packed as in `moesaic_low_bit.py`, `gate_scale`,
  `up_scale` bf16 [F, G], `norm`, perhaps `threshold`.
* `rest`: `codes` uint8 [F, 2 B + P] (without a gate [F, B + P]): packed low halves of gate and of up, then q of down in
  two's complement; `scale` bf16 [F, G], of down.

Axes: T tokens, D model width, F neurons, P D padded to a multiple of 64, B = P / 2, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .moesaic_kept import kept
from .moesaic_low_bit import BLOCK, LowBitRouter, unpack_codes
from .moesaic_neurons import NeuronFeedForward
from .moesaic_path_nested_rows import decoded_by_kernel
from .moesaic_routing import KeptAsStored
from .moesaic_slices import Matrices

ROWS = 512  # decoded at a time: bounds the memory beside the result


class NestedRouter(LowBitRouter):
    """Scores neurons by the high halves of int8 weights; see :class:`LowBitRouter`."""

    of_group: ClassVar[tuple[str, ...]] = ("scale",)

    def matrix(self, part: str) -> Tensor:
        codes_FB, scale_FG = (getattr(self, f"{part}_{name}") for name in ("codes", "scale"))
        return decoded(codes_FB, None, scale_FG, self.d_model, torch.float32)


class Rest(KeptAsStored):
    """What is read of chosen neurons alone."""

    def __init__(self, neurons: int, d_model: int, group: int, *, gated: bool) -> None:
        super().__init__()
        half = -(-d_model // BLOCK) * BLOCK // 2
        row = (4 if gated else 3) * half
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", torch.zeros(neurons, row, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(neurons, -(-d_model // group), dtype=torch.bfloat16))


class Int8Projection(nn.Module):
    """A projection whose weights lie in `router` and `rest`. Its bias is here."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)


class NestedFeedForward(NeuronFeedForward):
    """Neuron experts in int8. Paths compute with the exact product of code and scale, in fp32, or rounded once to the
    inputs' dtype.

    Args: as of :class:`NeuronFeedForward`, with 4 bits.

    Weights are not trained; gradients go through them to the inputs and to the biases.
    """

    layout: ClassVar[str] = "nested"
    linear: ClassVar[Any] = Int8Projection

    def __init__(self, spec: dict[str, Any], d_model: int, activation: str) -> None:
        super().__init__(spec, d_model, activation)
        self.rest = Rest(self.neurons, d_model, spec["router_group"], gated=spec["gated"])

    def _make_router(self, spec: dict[str, Any], d_model: int) -> nn.Module:
        return NestedRouter(spec, d_model)

    @property
    def low_bit(self) -> NestedRouter:
        return cast(NestedRouter, self._modules["router"])

    def matrices(self) -> Matrices:
        """The projections in fp32, decoded anew."""
        return self._with_biases(self._decoded(torch.float32))

    def matrices_for(self, x_TD: Tensor) -> Matrices:
        """The projections in the inputs' dtype; kept for a few tokens, see `moesaic_kept.py`."""
        return self._with_biases(kept(self, x_TD.dtype, len(x_TD), lambda: self._decoded(x_TD.dtype)))

    def _with_biases(self, weights: tuple[Tensor | None, Tensor, Tensor]) -> Matrices:
        gate_FD, up_FD, down_DF = weights
        gate_bias_F = None if self.gate_proj is None else self.gate_proj.bias
        return Matrices(gate_FD, gate_bias_F, up_FD, self.up_proj.bias, down_DF)

    @torch.no_grad()
    def _decoded(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gate or None, up, down."""
        router, rest, d_model = self.low_bit, self.rest, self.up_proj.in_features
        half = -(-d_model // BLOCK) * BLOCK // 2
        parts = ("gate", "up") if router.gated else ("up",)
        made: dict[str, Tensor] = {}
        for place, part in enumerate(parts):
            low_FB = rest.codes[:, place * half : (place + 1) * half]
            high_FB, scale_FG = (getattr(router, f"{part}_{name}") for name in ("codes", "scale"))
            made[part] = decoded(high_FB, low_FB, scale_FG, d_model, dtype)
        down_FD = decoded(None, rest.codes[:, len(parts) * half :], rest.scale, d_model, dtype)
        return made.get("gate"), made["up"], down_FD.t().contiguous()


def decoded(
    high_FB: Tensor | None, low_FB: Tensor | None, scale_FG: Tensor, d_model: int, dtype: torch.dtype
) -> Tensor:
    """The matrix [F, D] of packed halves, of high halves alone (with the middles of what they leave open), or of whole
    bytes as ``low_FB`` [F, P]."""
    by_kernel = decoded_by_kernel(high_FB, low_FB, scale_FG, d_model, dtype)
    if by_kernel is not None:
        return by_kernel

    def integers(rows: slice) -> Tensor:
        if high_FB is None:
            assert low_FB is not None
            return low_FB[rows].view(torch.int8)
        if low_FB is None:
            return unpack_codes(high_FB[rows], 4).to(torch.int16) * 16 - 120
        return _together(high_FB[rows], low_FB[rows])

    return _scaled(integers, scale_FG, d_model, dtype)


def _together(high_FB: Tensor, low_FB: Tensor) -> Tensor:
    """Codes q int8 [F, P] of packed halves. q + 128 has the bits of q in two's complement, but for the first."""
    high_FN1, low_FN1 = (halves.unflatten(1, (-1, 1, 16)) for halves in (high_FB, low_FB))
    pairs = torch.cat([high_FN1 << 4 | low_FN1 & 15, high_FN1 & 240 | low_FN1 >> 4], dim=2)
    return (pairs ^ 128).flatten(1).view(torch.int8)


def _scaled(integers: Callable[[slice], Tensor], scale_FG: Tensor, d_model: int, dtype: torch.dtype) -> Tensor:
    """Integers [F, P], read by rows, times their groups' scales: [F, D]. The product is exact in fp32, and rounded
    once in bf16, which holds both factors."""
    neurons, work = len(scale_FG), dtype if dtype == torch.bfloat16 else torch.float32
    out_FD = torch.empty(neurons, d_model, dtype=dtype, device=scale_FG.device)
    for start in range(0, neurons, ROWS):
        rows = slice(start, start + ROWS)
        codes_FGM = integers(rows).to(work).unflatten(1, (-1, BLOCK))
        out_FD[rows] = codes_FGM.mul_(scale_FG[rows].to(work)[:, :, None]).flatten(1)[:, :d_model]
    return out_FD
