"""The `moesaic` architecture: the path that computes exactly the rows that a token wants (see `moesaic_paths.py`).

Axes: T tokens, D model width, E routed experts, K experts per token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .moesaic_kernel import ACTIVATIONS, WEIGHTS, Call, kernel, part_of
from .moesaic_operators import MATRICES, can_be_called, operator
from .moesaic_side_by_side import can_lie, lay, lie, lies
from .moesaic_slices import MATRIX_UNIT

if TYPE_CHECKING:
    from .moesaic_ffn import MoEFeedForward

BLOCKS_FROM = {torch.float32: 8, torch.bfloat16: 3 if MATRIX_UNIT else 2, torch.float16: 2}
"""Tokens; fewer are computed neuron by neuron, which reads memory in its order. 16 bits must be widened for each token
then, fp32 need not."""

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
        if torch.compiler.is_compiling():
            return knows(x_TD, ffn) and can_be_called(x_TD, ffn, lies(ffn))
        known = can_compile(x_TD, ffn) and can_lie(ffn, x_TD.dtype, x_TD.device)
        return known and kernel(x_TD.dtype, part_of(self.layout)) is not None

    def run(self, ffn: Any, x_TD: Tensor) -> Tensor:
        idx_TK, weight_TK = ffn.choice(x_TD) if ffn.routed else (None, None)
        return computed(ffn, x_TD, idx_TK, weight_TK)


def can_compile(x_TD: Tensor, ffn: MoEFeedForward) -> bool:
    """Whether the kernel could compute this input, if there is one and the weights lie as it reads them."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return not tracing and knows(x_TD, ffn)


def knows(x_TD: Tensor, ffn: MoEFeedForward) -> bool:
    """Whether it is an input of the kernel: on a CPU, without gradients, a dtype and activation that it has."""
    if type(x_TD) is not Tensor or x_TD.device.type != "cpu" or x_TD.dtype not in WEIGHTS:
        return False
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and ffn.activation in ACTIVATIONS


def computed(ffn: Any, x_TD: Tensor, idx_TK: Tensor | None, weight_TK: Tensor | None) -> Tensor:
    """y_TD of the shared neurons and those of the chosen experts, all experts for None. Weights are laid side by side.

    Raises:
        ValueError: sizes or experts that the FFN does not have; nothing is read then.
    """
    # References are held until the end, whatever another thread does to the layers.
    own = matrices_and_biases(ffn) if torch.compiler.is_compiling() else laid(ffn)
    member = ffn.membership if ffn.layout == "union" else None
    sizes = ffn.shared, ffn.experts, ffn.width, ffn.activation
    function: Callable[..., Tensor] = ROWS if torch.compiler.is_compiling() else _rows
    return function(x_TD, *own, idx_TK, weight_TK, member, *sizes)


def laid(ffn: MoEFeedForward) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """:func:`matrices_and_biases` that lie side by side. Another thread may take them apart at any time."""
    while True:
        own = matrices_and_biases(ffn)
        if lie(*own[:3]):
            return own
        lay(ffn)


def matrices_and_biases(ffn: MoEFeedForward) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gate, up and down of plain layers, and the biases of gate and up."""
    gate, up, down = ffn.gate_proj, ffn.up_proj, ffn.down_proj
    gate_PD, gate_bias_P = (None, None) if gate is None else (gate.weight.detach(), gate.bias)
    return gate_PD, up.weight.detach(), down.weight.detach(), gate_bias_P, up.bias


def _rows(
    x_TD: Tensor,
    gate_PD: Tensor | None,
    up_PD: Tensor,
    down_DP: Tensor,
    gate_bias_P: Tensor | None,
    up_bias_P: Tensor | None,
    idx_TK: Tensor | None,
    weight_TK: Tensor | None,
    member_EU: Tensor | None,
    shared: int,
    experts: int,
    width: int,
    activation: str,
) -> Tensor:
    neurons, d_model = up_PD.shape
    if x_TD.shape[1] != d_model:
        raise ValueError(f"inputs of width {x_TD.shape[1]} for an FFN of width {d_model}")
    if member_EU is not None:
        member_EU = member_EU.contiguous()
        if member_EU.shape != (experts, neurons - shared):
            raise ValueError(f"a table of members of the shape {tuple(member_EU.shape)}")
    x_TD = x_TD.contiguous()
    if idx_TK is not None:
        idx_TK = idx_TK.to(torch.int64).contiguous()
        weight_TK = None if weight_TK is None else weight_TK.float().contiguous()
        if len(idx_TK) != len(x_TD) or (weight_TK is not None and weight_TK.shape != idx_TK.shape):
            raise ValueError(f"choices for {len(idx_TK)} of {len(x_TD)} tokens, or other weights than choices")
    y_TD = torch.empty_like(x_TD)
    call = Call(
        *map(_pointer, (x_TD, gate_PD, up_PD, down_DP, gate_bias_P, up_bias_P, idx_TK, weight_TK, member_EU, y_TD)),
        len(x_TD),
        d_model,
        neurons,
        shared,
        experts,
        width,
        0 if idx_TK is None else idx_TK.shape[1],
        0 if gate_PD is None else gate_PD.stride(0),
        up_PD.stride(0),
        down_DP.stride(1),
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    library = kernel(x_TD.dtype)
    if library is None:
        raise ValueError(ERRORS[2])
    few = len(x_TD) < BLOCKS_FROM[x_TD.dtype]
    failed = (library.moesaic_rows if few else library.moesaic_blocks)(ctypes.byref(call))
    if failed:
        raise ValueError(ERRORS[failed])
    return y_TD


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _checked_rows(x_TD: Tensor, gate_PD: Tensor | None, up_PD: Tensor, down_DP: Tensor, *others: Any) -> Tensor:
    check_matrices(x_TD, gate_PD, up_PD, down_DP)
    return _rows(x_TD, gate_PD, up_PD, down_DP, *others)


def check_matrices(x_TD: Tensor, gate_PD: Tensor | None, up_PD: Tensor, down_DP: Tensor) -> None:
    """What paths know of an FFN's weights, and an operator does not. Raises ValueError."""
    for name, weight_PD in (("gate", gate_PD), ("up", up_PD), ("down", down_DP.t())):
        if weight_PD is None:
            continue
        if weight_PD.shape != up_PD.shape:
            raise ValueError(f"the {name} projection has the shape {tuple(weight_PD.shape)}, not {tuple(up_PD.shape)}")
        if weight_PD.dtype != x_TD.dtype or not weight_PD.is_cpu:
            raise ValueError(f"the {name} projection has the dtype {weight_PD.dtype} on {weight_PD.device}")
        if weight_PD.stride(1) != 1 and weight_PD.shape[1] != 1:
            raise ValueError(f"the rows of the {name} projection do not lie in one piece: see moesaic_side_by_side.py")


_CHOICE = "Tensor? idx_TK, Tensor? weight_TK, Tensor? member_EU, int shared, int experts, int width, str activation"
ROWS = operator("rows", f"{MATRICES}, {_CHOICE}", _checked_rows)
"""What :func:`computed` computes, as an operator: for weights that lie side by side."""
