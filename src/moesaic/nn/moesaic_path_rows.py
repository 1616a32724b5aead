"""The `moesaic` architecture: the path that computes exactly the rows that a token wants (see `moesaic_paths.py`).

Axes: T tokens, D model width, E routed experts, K experts per token.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .moesaic_kernel import ACTIVATIONS, WEIGHTS, Call, kernel
from .moesaic_side_by_side import can_lie, lay, layers, lies

if TYPE_CHECKING:
    from .moesaic_ffn import MoEFeedForward

BLOCKS_FROM = 2  # tokens; one alone is computed neuron by neuron

ERRORS = {
    1: "the router chose an expert that does not exist",
    2: "there is no memory left",
    3: "the activation is not known",
    4: "a router has 2, 3 or 4 bits and groups of 32, 64 or 128",
    5: "the number of neurons to choose is not between 1 and all",
}


class Rows:
    """Each wanted neuron is read once, for all tokens that want it, by a compiled kernel on the CPU.

    At its first use an FFN's weights are laid side by side (`moesaic_side_by_side.py`). Sums are fp32.
    """

    name = "rows"

    def __init__(self, layout: str) -> None:
        self.layout = layout

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return can_compile(x_TD, ffn) and can_lie(ffn, x_TD.dtype, x_TD.device) and kernel(x_TD.dtype) is not None

    def run(self, ffn: Any, x_TD: Tensor) -> Tensor:
        idx_TK, weight_TK = ffn.choice(x_TD) if ffn.routed else (None, None)
        if not lies(ffn):
            lay(ffn)
        return computed(ffn, x_TD, idx_TK, weight_TK)


def can_compile(x_TD: Tensor, ffn: MoEFeedForward) -> bool:
    """Whether a kernel could compute this input, if there is one and the weights lie as it reads them."""
    if type(x_TD) is not Tensor or x_TD.device.type != "cpu" or x_TD.dtype not in WEIGHTS:
        return False
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if torch.is_grad_enabled() or tracing:
        return False
    return not torch.is_autocast_enabled("cpu") and ffn.activation in ACTIVATIONS


def computed(ffn: Any, x_TD: Tensor, idx_TK: Tensor | None, weight_TK: Tensor | None) -> Tensor:
    """y_TD of the shared neurons and those of the chosen experts, all experts for None.

    Raises:
        ValueError: sizes or experts that the FFN does not have; nothing is read then.
    """
    up = ffn.up_proj
    if x_TD.shape[1] != up.in_features:
        raise ValueError(f"inputs of width {x_TD.shape[1]} for an FFN of width {up.in_features}")
    # References are held until the end, whatever another thread does to the layers.
    weights = [layer.weight.detach() for layer in layers(ffn)]
    gate = weights[0] if len(weights) == 3 else None
    x_TD = x_TD.contiguous()
    member = None
    if ffn.layout == "union":
        member = ffn.membership.contiguous()
        if member.shape != (ffn.experts, ffn.neurons - ffn.shared):
            raise ValueError(f"a table of members of the shape {tuple(member.shape)}")
    if idx_TK is not None:
        idx_TK = idx_TK.to(torch.int64).contiguous()
        weight_TK = None if weight_TK is None else weight_TK.float().contiguous()
        if len(idx_TK) != len(x_TD) or (weight_TK is not None and weight_TK.shape != idx_TK.shape):
            raise ValueError(f"choices for {len(idx_TK)} of {len(x_TD)} tokens, or other weights than choices")
    y_TD = torch.empty_like(x_TD)
    call = Call(
        x_TD.data_ptr(),
        _pointer(gate),
        weights[-2].data_ptr(),
        weights[-1].data_ptr(),
        None if gate is None else _pointer(ffn.gate_proj.bias),
        _pointer(up.bias),
        _pointer(idx_TK),
        _pointer(weight_TK),
        _pointer(member),
        y_TD.data_ptr(),
        len(x_TD),
        x_TD.shape[1],
        ffn.neurons,
        ffn.shared,
        ffn.experts,
        ffn.width,
        0 if idx_TK is None else idx_TK.shape[1],
        0 if gate is None else gate.stride(0),
        weights[-2].stride(0),
        weights[-1].stride(1),
        ACTIVATIONS[ffn.activation],
        torch.get_num_threads(),
    )
    library = kernel(x_TD.dtype)
    if library is None:
        raise ValueError(ERRORS[2])
    few = len(x_TD) < BLOCKS_FROM
    failed = (library.moesaic_rows if few else library.moesaic_blocks)(ctypes.byref(call))
    if failed:
        raise ValueError(ERRORS[failed])
    return y_TD


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
