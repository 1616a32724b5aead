"""The `moesaic` architecture: the path that reads of int8 weights the high halves, and the rest of what a token chose
(see `moesaic_paths.py`).

Axes: T tokens, D model width, F neurons, G groups.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .moesaic_kernel import ACTIVATIONS, SINGLE, WEIGHTS, Call, Decode, LowBit, kernel
from .moesaic_operators import compiles, operator
from .moesaic_path_neuron_rows import Decisions, Kept, called, kept_for, of_router, pointers
from .moesaic_path_rows import Rows, can_compile, knows

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
        if not (all(own) and ffn.rest.codes.is_cpu):
            return False
        if torch.compiler.is_compiling():
            return knows(x_TD, ffn) and compiles(x_TD.dtype, SINGLE)
        return can_compile(x_TD, ffn) and kernel(x_TD.dtype, SINGLE) is not None

    def run(self, ffn: NestedFeedForward, x_TD: Tensor) -> Tensor:
        y_TD = operated(ffn, x_TD) if torch.compiler.is_compiling() else computed_nested(ffn, x_TD)
        bias_D = ffn.down_proj.bias
        return y_TD if bias_D is None else y_TD + bias_D


class NestedTensors(NamedTuple):
    """All that the kernel reads of an FFN. What has a gate has all of its tensors."""

    gate_codes: Tensor | None
    gate_scale: Tensor | None
    up_codes: Tensor
    up_scale: Tensor
    norm: Tensor
    threshold: Tensor | None
    codes: Tensor
    scale: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None

    @property
    def bits(self) -> int:
        return 4

    @property
    def group(self) -> int:
        return 64

    @property
    def of_group(self) -> tuple[str, ...]:
        return ("scale",)


_KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def computed_nested(ffn: NestedFeedForward, x_TD: Tensor, decisions: Decisions | None = None) -> Tensor:
    """y_TD without the output bias; ``decisions`` are filled, if they are given.

    Raises:
        ValueError: sizes, dtypes or a number of experts that do not fit each other; nothing is read then.
    """
    tensors = _tensors(ffn)
    there = [tensor for tensor in tensors if tensor is not None]
    kept = _KEPT.get(ffn)
    if kept is None or kept.dtype != x_TD.dtype or [tensor.data_ptr() for tensor in there] != kept.places:
        if (ffn.low_bit.bits, ffn.low_bit.group) != (tensors.bits, tensors.group):
            raise ValueError(
                f"the router of int8 weights has {tensors.bits} bits and groups of {tensors.group}, "
                f"not {ffn.low_bit.bits} and {ffn.low_bit.group}"
            )
        call, low_bit = _calls(tensors, ffn.neurons, ffn.up_proj.in_features, ffn.activation)
        kept = _KEPT[ffn] = Kept(there, [tensor.data_ptr() for tensor in there], call, low_bit, x_TD.dtype)
    return called("moesaic_nested", kept, x_TD, decisions, ffn.top_k if ffn.routed else ffn.neurons)


def _tensors(ffn: NestedFeedForward) -> NestedTensors:
    router, gate = ffn.low_bit, ffn.gate_proj
    of_gate = (None, None) if gate is None else (router.gate_codes, router.gate_scale)
    threshold = router.threshold if ffn.routed else None  # it would choose
    of_up = router.up_codes, router.up_scale
    biases = None if gate is None else gate.bias, ffn.up_proj.bias
    return NestedTensors(*of_gate, *of_up, router.norm, threshold, ffn.rest.codes, ffn.rest.scale, *biases)


def _calls(tensors: NestedTensors, neurons: int, d_model: int, activation: str) -> tuple[Call, LowBit]:
    """What all calls with these tensors have in common. Raises ValueError for shapes that do not fit each other."""
    groups, gated = -(-d_model // 64), tensors.gate_codes is not None
    places = pointers(tensors, of_router(tensors, gated=gated, neurons=neurons, d_model=d_model))
    row = (4 if gated else 3) * 32 * groups
    rest = {"codes": ((neurons, row), torch.uint8), "scale": ((neurons, groups), torch.bfloat16)}
    found = pointers(tensors, rest)
    call = Call(
        gate=places.get("gate_codes"),  # says that there is one
        gate_bias=None if tensors.gate_bias is None else tensors.gate_bias.data_ptr(),
        up_bias=None if tensors.up_bias is None else tensors.up_bias.data_ptr(),
        d_model=d_model,
        neurons=neurons,
        activation=ACTIVATIONS[activation],
    )
    own = LowBit(**places, rest=found["codes"], rest_scale=found["scale"], bits=tensors.bits, group=tensors.group)
    return call, own


def operated(ffn: NestedFeedForward, x_TD: Tensor) -> Tensor:
    """:func:`computed_nested` as an operator."""
    top_k = ffn.top_k if ffn.routed else ffn.neurons
    return NESTED(x_TD, *_tensors(ffn), ffn.neurons, ffn.up_proj.in_features, top_k, ffn.activation)


def _nested(x_TD: Tensor, *given: Any) -> Tensor:
    *own, neurons, d_model, top_k, activation = given
    tensors = NestedTensors(*own)
    # All that a call is made of: what was checked once is not checked again.
    shapes = [None if part is None else (part.data_ptr(), part.shape, part.stride(), part.dtype) for part in tensors]
    key = "nested", *shapes, neurons, d_model, activation, x_TD.dtype

    def made() -> tuple[Call, LowBit]:
        for bias in (tensors.gate_bias, tensors.up_bias):
            if bias is not None and (bias.shape, bias.dtype) != ((neurons,), x_TD.dtype):
                raise ValueError(f"a bias of the shape {tuple(bias.shape)} in {bias.dtype}")
        return _calls(tensors, neurons, d_model, activation)

    return called("moesaic_nested", kept_for(key, made, x_TD.dtype), x_TD, None, top_k)


_CODES = "Tensor? gate_codes, Tensor? gate_scale, Tensor up_codes, Tensor up_scale, Tensor norm, Tensor? threshold"
_REST = "Tensor codes, Tensor scale, Tensor? gate_bias, Tensor? up_bias"
NESTED = operator("nested", f"{_CODES}, {_REST}, int neurons, int d_model, int top_k, str activation", _nested)
"""What :func:`operated` calls."""


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
