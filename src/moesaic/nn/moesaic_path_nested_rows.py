"""The `moesaic` architecture: the path that reads of int8 weights the high halves, and the rest of what a token chose
(see `moesaic_paths.py`).

Axes: T tokens, D model width, F neurons, G groups.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .moesaic_kernel import ACTIVATIONS, SINGLE, WEIGHTS, Call, Decode, LowBit, kernel
from .moesaic_path_neuron_rows import Decisions, Kept, called, of_router, pointers
from .moesaic_path_rows import Rows, can_compile

if TYPE_CHECKING:
    from .moesaic_nested import NestedFeedForward


class NestedRows(Rows):
    """Scores, the choice and the chosen neurons in one call of the compiled kernel, from the codes as they are stored.

    Sums are fp32. Scores are those of the router within the rounding of sums, so that nearly equal ones may be chosen
    otherwise.
    """

    def __init__(self) -> None:
        super().__init__("nested")

    def supports(self, x_TD: Tensor, ffn: Any) -> bool:
        biases = [layer.bias for layer in (ffn.gate_proj, ffn.up_proj) if layer is not None]
        own = [(bias.dtype, bias.device) == (x_TD.dtype, x_TD.device) for bias in biases if bias is not None]
        return all(own) and ffn.rest.codes.is_cpu and can_compile(x_TD, ffn) and kernel(x_TD.dtype, SINGLE) is not None

    def run(self, ffn: NestedFeedForward, x_TD: Tensor) -> Tensor:
        y_TD = computed_nested(ffn, x_TD)
        bias_D = ffn.down_proj.bias
        return y_TD if bias_D is None else y_TD + bias_D


_KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def computed_nested(ffn: NestedFeedForward, x_TD: Tensor, decisions: Decisions | None = None) -> Tensor:
    """y_TD without the output bias; ``decisions`` are filled, if they are given.

    Raises:
        ValueError: sizes, dtypes or a number of experts that do not fit each other; nothing is read then.
    """
    kept = _KEPT.get(ffn)
    if kept is None or kept.dtype != x_TD.dtype or [tensor.data_ptr() for tensor in _tensors(ffn)] != kept.places:
        kept = _KEPT[ffn] = _made(ffn, x_TD.dtype)
    if not ffn.routed:  # a threshold would choose
        low_bit = LowBit.from_buffer_copy(kept.low_bit)
        low_bit.threshold = None
        kept = kept._replace(low_bit=low_bit)
    return called("moesaic_nested", kept, x_TD, decisions, ffn.top_k if ffn.routed else ffn.neurons)


def _tensors(ffn: NestedFeedForward) -> list[Tensor]:
    """All that the kernel reads."""
    biases = [layer.bias for layer in (ffn.gate_proj, ffn.up_proj) if layer is not None and layer.bias is not None]
    return [*ffn.low_bit.buffers(), *ffn.rest.buffers(), *biases]


def _made(ffn: NestedFeedForward, dtype: torch.dtype) -> Kept:
    neurons, d_model, router = ffn.neurons, ffn.up_proj.in_features, ffn.low_bit
    groups, gated = -(-d_model // 64), ffn.gate_proj is not None
    places = pointers(router, of_router(router, gated=gated, neurons=neurons, d_model=d_model))
    row = (4 if gated else 3) * 32 * groups
    rest = {"codes": ((neurons, row), torch.uint8), "scale": ((neurons, groups), torch.bfloat16)}
    found = pointers(ffn.rest, rest)
    gate_bias = None if ffn.gate_proj is None else ffn.gate_proj.bias
    call = Call(
        gate=places.get("gate_codes"),  # says that there is one
        gate_bias=None if gate_bias is None else gate_bias.data_ptr(),
        up_bias=None if ffn.up_proj.bias is None else ffn.up_proj.bias.data_ptr(),
        d_model=d_model,
        neurons=neurons,
        activation=ACTIVATIONS[ffn.activation],
    )
    low_bit = LowBit(**places, rest=found["codes"], rest_scale=found["scale"], bits=router.bits, group=router.group)
    tensors = _tensors(ffn)
    return Kept(tensors, [tensor.data_ptr() for tensor in tensors], call, low_bit, dtype)


def decoded_by_kernel(
    high_FB: Tensor | None, low_FB: Tensor | None, scale_FG: Tensor, d_model: int, dtype: torch.dtype
) -> Tensor | None:
    """What `decoded` of `moesaic_nested.py` computes, bit for bit; None where the kernel does not."""
    given = [tensor for tensor in (high_FB, low_FB, scale_FG) if tensor is not None]
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing or dtype not in WEIGHTS or any(type(tensor) is not Tensor or not tensor.is_cpu for tensor in given):
        return None
    # Weights in fp32 can be had from the kernel of any dtype: no model needs a second one for them.
    library = kernel(torch.bfloat16 if dtype == torch.float32 else dtype, SINGLE)
    if library is None or scale_FG.dtype != torch.bfloat16:
        return None
    neurons, groups = scale_FG.shape
    high_FB, scale_FG = None if high_FB is None else high_FB.contiguous(), scale_FG.contiguous()
    low_FB = None if low_FB is None else low_FB if low_FB.stride(1) == 1 else low_FB.contiguous()
    shapes = {"high": (high_FB, groups * 32), "low": (low_FB, groups * (32 if high_FB is not None else 64))}
    for name, (codes, width) in shapes.items():
        if codes is not None and (codes.shape != (neurons, width) or codes.dtype != torch.uint8):
            raise ValueError(f"{name} codes of the shape {tuple(codes.shape)}, not {(neurons, width)}")
    if -(-d_model // 64) != groups:
        raise ValueError(f"{groups} groups for a width of {d_model}")
    out_FD = torch.empty(neurons, d_model, dtype=dtype)
    places = (None if tensor is None else tensor.data_ptr() for tensor in (high_FB, low_FB, scale_FG, out_FD))
    stride = 0 if low_FB is None else low_FB.stride(0)
    single = dtype == torch.float32
    library.moesaic_decode(ctypes.byref(Decode(*places, neurons, d_model, stride, single, torch.get_num_threads())))
    return out_FD
