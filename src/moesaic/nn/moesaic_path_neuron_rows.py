"""The `moesaic` architecture: the CPU path of neuron experts, from the router to the output (see `moesaic_paths.py`).

Axes: T tokens, D model width, P neurons, B bytes of a row of codes, G groups.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .moesaic_kernel import ACTIVATIONS, Call, LowBit, kernel
from .moesaic_path_rows import ERRORS
from .moesaic_side_by_side import layers, lies


class Decisions(NamedTuple):
    """What the kernel found: scores_TP in fp32, and which neurons it took, taken_TP."""

    scores_TP: Tensor
    taken_TP: Tensor


def computed_neurons(ffn: Any, x_TD: Tensor, decisions: Decisions | None = None) -> Tensor:
    """y_TD without the output bias; ``decisions`` are filled, if they are given.

    Raises:
        ValueError: sizes, bits or a number of experts that do not fit each other; nothing is read then.
    """
    router, up = ffn.router, ffn.up_proj
    if x_TD.shape[1] != up.in_features:
        raise ValueError(f"inputs of width {x_TD.shape[1]} for an FFN of width {up.in_features}")
    if not lies(ffn):
        raise ValueError("the weights of a neuron do not lie in one piece")
    weights = [layer.weight.detach() for layer in layers(ffn)]  # held until the end, as all that the kernel reads
    gate = weights[0] if len(weights) == 3 else None
    tensors = _router_tensors(router, gated=gate is not None, neurons=ffn.neurons, d_model=up.in_features)
    x_TD = x_TD.contiguous()
    y_TD = torch.empty_like(x_TD)
    call = Call(
        x=x_TD.data_ptr(),
        gate=None if gate is None else gate.data_ptr(),
        up=weights[-2].data_ptr(),
        down=weights[-1].data_ptr(),
        gate_bias=None if gate is None or ffn.gate_proj.bias is None else ffn.gate_proj.bias.data_ptr(),
        up_bias=None if up.bias is None else up.bias.data_ptr(),
        y=y_TD.data_ptr(),
        tokens=len(x_TD),
        d_model=x_TD.shape[1],
        neurons=ffn.neurons,
        top_k=ffn.top_k,
        gate_stride=0 if gate is None else gate.stride(0),
        up_stride=weights[-2].stride(0),
        down_stride=weights[-1].stride(1),
        activation=ACTIVATIONS[ffn.activation],
        threads=torch.get_num_threads(),
    )
    found = {} if decisions is None else {"scores": decisions.scores_TP, "taken": decisions.taken_TP}
    pointers = {name: tensor.data_ptr() for name, tensor in (tensors | found).items()}
    library = kernel(x_TD.dtype)
    low_bit = LowBit(**pointers, bits=router.bits, group=router.group)
    failed = library.moesaic_neurons(ctypes.byref(call), ctypes.byref(low_bit)) if library is not None else 2
    if failed:
        raise ValueError(ERRORS[failed])
    return y_TD


def _router_tensors(router: Any, *, gated: bool, neurons: int, d_model: int) -> dict[str, Tensor]:
    """Those that the kernel reads, by the names of its fields; of the shapes and dtypes that it takes them to have."""
    row_bytes, groups = -(-d_model // 64) * 8 * router.bits, -(-d_model // router.group)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"norm": ((neurons,), torch.float32)}
    for name in ("gate", "up") if gated else ("up",):
        expected[f"{name}_codes"] = (neurons, row_bytes), torch.uint8
        expected |= {f"{name}_{part}": ((neurons, groups), torch.bfloat16) for part in ("scale", "offset")}
    if router.threshold is not None:
        expected["threshold"] = (1,), torch.float32
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in expected.items():
        tensor = getattr(router, name).detach()
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu:
            raise ValueError(f"the router's {name} is {tuple(tensor.shape)} in {tensor.dtype}, not {shape} in {dtype}")
        tensors[name] = tensor.contiguous()
    return tensors
