"""The `moesaic` architecture: the path that reads exactly the neurons that a token chose (see `moesaic_paths.py`).

Axes: T tokens, D model width, F neurons, B bytes of a row of codes, G groups.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .moesaic_kernel import ACTIVATIONS, Call, LowBit, kernel
from .moesaic_path_rows import ERRORS, Rows, computed
from .moesaic_side_by_side import lay, layers, lies

if TYPE_CHECKING:
    from .moesaic_low_bit import LowBitRouter
    from .moesaic_neurons import NeuronFeedForward


class NeuronRows(Rows):
    """Scores, the choice and the chosen neurons in one call of the compiled kernel; see :class:`Rows`.

    Scores are those of the router within the rounding of sums, so that nearly equal ones may be chosen otherwise.
    """

    def __init__(self) -> None:
        super().__init__("neurons")

    def run(self, ffn: NeuronFeedForward, x_TD: Tensor) -> Tensor:
        if ffn.routed:
            y_TD = computed_neurons(ffn, x_TD)
        else:
            if not lies(ffn):
                lay(ffn)
            y_TD = computed(ffn, x_TD, None, None)
        bias_D = ffn.down_proj.bias
        return y_TD if bias_D is None else y_TD + bias_D


class Decisions(NamedTuple):
    """What the kernel found: scores_TF in fp32, and which neurons it took, taken_TF."""

    scores_TF: Tensor
    taken_TF: Tensor


class Kept(NamedTuple):
    """The calls' common part, which holds while all tensors are where they were. Making it takes longer than a call."""

    tensors: list[Tensor]
    places: list[int]
    call: Call
    low_bit: LowBit
    dtype: torch.dtype


_KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def computed_neurons(ffn: NeuronFeedForward, x_TD: Tensor, decisions: Decisions | None = None) -> Tensor:
    """y_TD without the output bias; ``decisions`` are filled, if they are given. Weights are laid side by side first.

    Raises:
        ValueError: sizes, bits, dtypes or a number of experts that do not fit each other; nothing is read then.
    """
    return called("moesaic_neurons", _kept(ffn), ffn, x_TD, decisions, ffn.top_k)


def called(
    name: str, kept: Kept, ffn: NeuronFeedForward, x_TD: Tensor, decisions: Decisions | None, top_k: int
) -> Tensor:
    """What a function of the kernel computes; see :func:`computed_neurons`."""
    if x_TD.shape[1] != kept.call.d_model or x_TD.dtype != kept.dtype:
        own, expected = (
            f"of width {width} in {dtype}"
            for width, dtype in ((x_TD.shape[1], x_TD.dtype), (kept.call.d_model, kept.dtype))
        )
        raise ValueError(f"inputs {own} for an FFN {expected}")
    x_TD = x_TD.contiguous()
    y_TD = torch.empty_like(x_TD)
    call, low_bit = Call.from_buffer_copy(kept.call), kept.low_bit
    call.x, call.y, call.tokens = x_TD.data_ptr(), y_TD.data_ptr(), len(x_TD)
    call.top_k, call.threads = top_k, torch.get_num_threads()
    if decisions is not None:
        low_bit = LowBit.from_buffer_copy(low_bit)
        low_bit.scores, low_bit.taken = decisions.scores_TF.data_ptr(), decisions.taken_TF.data_ptr()
    library = kernel(x_TD.dtype)
    failed = 2 if library is None else getattr(library, name)(ctypes.byref(call), ctypes.byref(low_bit))
    if failed:
        raise ValueError(ERRORS[failed])
    return y_TD


def _kept(ffn: NeuronFeedForward) -> Kept:
    kept = _KEPT.get(ffn)
    if kept is None or [tensor.data_ptr() for tensor in _tensors(ffn)] != kept.places:
        if not lies(ffn):
            lay(ffn)
        kept = _KEPT[ffn] = _made(ffn)
    return kept


def _tensors(ffn: NeuronFeedForward) -> list[Tensor]:
    """All that the kernel reads."""
    found = [ffn._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj", "router")]
    return [
        tensor
        for module in found
        if module is not None
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]


def _made(ffn: NeuronFeedForward) -> Kept:
    weights = [layer.weight.detach() for layer in layers(ffn)]
    gate, up, down = weights[0] if ffn.gate_proj is not None else None, weights[-2], weights[-1]
    neurons, d_model = ffn.neurons, ffn.up_proj.in_features
    if any(weight.shape != (neurons, d_model) for weight in (*weights[:-1], down.t())):
        raise ValueError(f"weights that are not of {neurons} neurons of width {d_model}")
    call = Call(
        gate=None if gate is None else gate.data_ptr(),
        up=up.data_ptr(),
        down=down.data_ptr(),
        gate_bias=None if ffn.gate_proj is None or ffn.gate_proj.bias is None else ffn.gate_proj.bias.data_ptr(),
        up_bias=None if ffn.up_proj.bias is None else ffn.up_proj.bias.data_ptr(),
        d_model=d_model,
        neurons=neurons,
        gate_stride=0 if gate is None else gate.stride(0),
        up_stride=up.stride(0),
        down_stride=down.stride(1),
        activation=ACTIVATIONS[ffn.activation],
    )
    router = ffn.low_bit
    expected = of_router(router, gated=gate is not None, neurons=neurons, d_model=d_model)
    tensors = _tensors(ffn)
    places = [tensor.data_ptr() for tensor in tensors]
    return Kept(
        tensors, places, call, LowBit(**pointers(router, expected), bits=router.bits, group=router.group), up.dtype
    )


Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes of buffers, by name."""


def of_router(router: LowBitRouter, *, gated: bool, neurons: int, d_model: int) -> Expected:
    """What the kernel takes a router's tensors to be, by the names of its own fields."""
    row_bytes, groups = -(-d_model // 64) * 8 * router.bits, -(-d_model // router.group)
    expected: Expected = {"norm": ((neurons,), torch.float32)}
    for name in ("gate", "up") if gated else ("up",):
        expected[f"{name}_codes"] = (neurons, row_bytes), torch.uint8
        expected |= {f"{name}_{part}": ((neurons, groups), torch.bfloat16) for part in router.of_group}
    if router.threshold is not None:
        expected["threshold"] = (1,), torch.float32
    return expected


def pointers(router: nn.Module, expected: Expected) -> dict[str, int]:
    """Where buffers of the FFN lie. Raises ValueError for one that is not as expected."""
    for name, (shape, dtype) in expected.items():
        tensor = getattr(router, name)
        if tensor.shape != shape or tensor.dtype != dtype or not (tensor.is_cpu and tensor.is_contiguous()):
            own, wanted = f"{tuple(tensor.shape)} in {tensor.dtype}", f"{shape} in {dtype}, in one piece and in memory"
            raise ValueError(f"the router's {name} is {own}, not {wanted}")
    return {name: getattr(router, name).data_ptr() for name in expected}
