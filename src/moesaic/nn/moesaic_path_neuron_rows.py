"""The `moesaic` architecture: the path that reads exactly the neurons that a token chose (see `moesaic_paths.py`).

Axes: T tokens, D model width, F neurons, B bytes of a row of codes, G groups.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .moesaic_kernel import ACTIVATIONS, SINGLE, Call, LowBit, kernel
from .moesaic_operators import MATRICES, operator
from .moesaic_path_rows import ERRORS, Rows, check_matrices, computed, laid, matrices_and_biases

if TYPE_CHECKING:
    from .moesaic_low_bit import LowBitRouter
    from .moesaic_neurons import NeuronFeedForward
    from .moesaic_path_nested_rows import NestedTensors


class NeuronRows(Rows):
    """Scores, the choice and the chosen neurons in one call of the compiled kernel; see :class:`Rows`.

    Scores are those of the router within the rounding of sums, so that nearly equal ones may be chosen otherwise.
    """

    def __init__(self) -> None:
        super().__init__("neurons")

    def run(self, ffn: NeuronFeedForward, x_TD: Tensor) -> Tensor:
        if ffn.routed:
            y_TD = operated(ffn, x_TD) if torch.compiler.is_compiling() else computed_neurons(ffn, x_TD)
        else:
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
    while True:
        kept = _kept(ffn)
        held = matrices_and_biases(ffn)  # until the end: another thread may take the weights apart meanwhile
        places = [None if matrix is None else matrix.data_ptr() for matrix in held[:3]]
        if places == [kept.call.gate, kept.call.up, kept.call.down]:
            return called("moesaic_neurons", kept, x_TD, decisions, ffn.top_k)
        _KEPT.pop(ffn, None)


def called(name: str, kept: Kept, x_TD: Tensor, decisions: Decisions | None, top_k: int) -> Tensor:
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
    library = kernel(x_TD.dtype, SINGLE)
    failed = 2 if library is None else getattr(library, name)(ctypes.byref(call), ctypes.byref(low_bit))
    if failed:
        raise ValueError(ERRORS[failed])
    return y_TD


def _kept(ffn: NeuronFeedForward) -> Kept:
    kept = _KEPT.get(ffn)
    if kept is None or [tensor.data_ptr() for tensor in _tensors(ffn)] != kept.places:
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
    matrices = laid(ffn)
    if matrices[1].shape != (ffn.neurons, ffn.up_proj.in_features):
        raise ValueError(f"weights that are not of {ffn.neurons} neurons of width {ffn.up_proj.in_features}")
    call, low_bit = _calls(*matrices, ffn.low_bit, ffn.activation)
    tensors = _tensors(ffn)
    return Kept(tensors, [tensor.data_ptr() for tensor in tensors], call, low_bit, matrices[1].dtype)


def _calls(
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    router: RouterTensors | LowBitRouter,
    activation: str,
) -> tuple[Call, LowBit]:
    """What all calls for these weights have in common. Raises ValueError for shapes that do not fit each other."""
    neurons, d_model = up.shape
    if down.shape != (d_model, neurons) or (gate is not None and gate.shape != up.shape):
        raise ValueError(f"weights that are not of {neurons} neurons of width {d_model}")
    call = Call(
        gate=None if gate is None else gate.data_ptr(),
        up=up.data_ptr(),
        down=down.data_ptr(),
        gate_bias=None if gate_bias is None else gate_bias.data_ptr(),
        up_bias=None if up_bias is None else up_bias.data_ptr(),
        d_model=d_model,
        neurons=neurons,
        gate_stride=0 if gate is None else gate.stride(0),
        up_stride=up.stride(0),
        down_stride=down.stride(1),
        activation=ACTIVATIONS[activation],
    )
    expected = of_router(router, gated=gate is not None, neurons=neurons, d_model=d_model)
    return call, LowBit(**pointers(router, expected), bits=router.bits, group=router.group)


class RouterTensors(NamedTuple):
    """What the kernel reads of a :class:`LowBitRouter`, as an operator has it."""

    gate_codes: Tensor | None
    gate_scale: Tensor | None
    gate_offset: Tensor | None
    up_codes: Tensor
    up_scale: Tensor
    up_offset: Tensor
    norm: Tensor
    threshold: Tensor | None
    bits: int
    group: int

    @property
    def of_group(self) -> tuple[str, ...]:
        return ("scale", "offset")


def operated(ffn: NeuronFeedForward, x_TD: Tensor) -> Tensor:
    """:func:`computed_neurons` as an operator. The weights lie side by side already."""
    router = ffn.low_bit
    of_gate = (router.gate_codes, router.gate_scale, router.gate_offset) if router.gated else (None, None, None)
    own = *of_gate, router.up_codes, router.up_scale, router.up_offset, router.norm, router.threshold
    sizes = router.bits, router.group, ffn.top_k, ffn.activation
    return NEURONS(x_TD, *matrices_and_biases(ffn), *own, *sizes)


def _neurons(
    x_TD: Tensor,
    gate_PD: Tensor | None,
    up_PD: Tensor,
    down_DP: Tensor,
    gate_bias_P: Tensor | None,
    up_bias_P: Tensor | None,
    *given: Any,
) -> Tensor:
    matrices = gate_PD, up_PD, down_DP, gate_bias_P, up_bias_P
    *router, top_k, activation = given
    places = tuple(part.data_ptr() if isinstance(part, Tensor) else part for part in (*matrices, *router))
    # All that a call is made of: what was checked once is not checked again, and another tensor there makes no other.
    key = *places, activation, up_PD.shape, up_PD.stride(), down_DP.stride(), up_PD.dtype

    def made() -> tuple[Call, LowBit]:
        check_matrices(x_TD, gate_PD, up_PD, down_DP)
        return _calls(*matrices, RouterTensors(*router), activation)

    return called("moesaic_neurons", kept_for(key, made, up_PD.dtype), x_TD, None, top_k)


_OPERATED: dict[tuple[object, ...], Kept] = {}
MOST_KEPT = 4096  # FFNs of models that are no longer there are forgotten at some time


def kept_for(key: tuple[object, ...], made: Callable[[], tuple[Call, LowBit]], dtype: torch.dtype) -> Kept:
    """What an operator's calls with these tensors have in common; ``made`` at the first of them."""
    kept = _OPERATED.get(key)
    if kept is None:
        call, low_bit = made()
        if len(_OPERATED) >= MOST_KEPT:
            _OPERATED.clear()
        kept = _OPERATED[key] = Kept([], [], call, low_bit, dtype)
    return kept


_ROUTER = (
    "Tensor? gate_codes, Tensor? gate_scale, Tensor? gate_offset, Tensor up_codes, Tensor up_scale, Tensor up_offset, "
    "Tensor norm, Tensor? threshold, int bits, int group, int top_k, str activation"
)
NEURONS = operator("neurons", f"{MATRICES}, {_ROUTER}", _neurons)
"""What :func:`operated` calls."""


Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes of buffers, by name."""


def of_router(
    router: RouterTensors | LowBitRouter | NestedTensors, *, gated: bool, neurons: int, d_model: int
) -> Expected:
    """What the kernel takes a router's tensors to be, by the names of its own fields."""
    row_bytes, groups = -(-d_model // 64) * 8 * router.bits, -(-d_model // router.group)
    expected: Expected = {"norm": ((neurons,), torch.float32)}
    for name in ("gate", "up") if gated else ("up",):
        expected[f"{name}_codes"] = (neurons, row_bytes), torch.uint8
        expected |= {f"{name}_{part}": ((neurons, groups), torch.bfloat16) for part in router.of_group}
    if router.threshold is not None:
        expected["threshold"] = (1,), torch.float32
    return expected


def pointers(router: object, expected: Expected) -> dict[str, int]:
    """Where buffers of the FFN lie. Raises ValueError for one that is not as expected."""
    for name, (shape, dtype) in expected.items():
        tensor = getattr(router, name)
        if tensor.shape != shape or tensor.dtype != dtype or not (tensor.is_cpu and tensor.is_contiguous()):
            own, wanted = f"{tuple(tensor.shape)} in {tensor.dtype}", f"{shape} in {dtype}, in one piece and in memory"
            raise ValueError(f"the router's {name} is {own}, not {wanted}")
    return {name: getattr(router, name).data_ptr() for name in expected}
