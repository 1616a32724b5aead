"""The `moesaic` architecture: torch's products with one compiled pass between them (see `moesaic_paths.py`).

Where a CPU multiplies fast, the passes between two products take a large part of the time: activation, gate, biases,
weights, each through memory. Here they are one.

Axes: T tokens, D model width, M neurons of a run, N groups of neurons.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import moesaic_path_packed, moesaic_path_union
from .moesaic_kernel import ACTIVATIONS, WEIGHTS, Fused, kernel
from .moesaic_path_rows import ERRORS
from .moesaic_path_sorted import by_expert
from .moesaic_slices import Matrices, Members, Weights, slice_of

if TYPE_CHECKING:
    from .moesaic_ffn import MoEFeedForward

MASKED = {"packed": moesaic_path_packed.masked, "union": moesaic_path_union.masked}


class FusedMasked:
    """As `masked`: all tokens through all rows that some token uses."""

    name = "fused"

    def __init__(self, layout: str) -> None:
        self.layout = layout

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return ffn.routed and can_fuse(x_TD, ffn)

    def run(self, ffn: Any, x_TD: Tensor) -> Tensor:
        return MASKED[self.layout](ffn, fused(ffn), x_TD)


class FusedSorted(FusedMasked):
    """As `sorted`: each expert multiplies the tokens that chose it."""

    name = "fused_sorted"

    def run(self, ffn: Any, x_TD: Tensor) -> Tensor:
        return by_expert(ffn, fused(ffn), x_TD, *ffn.choice(x_TD))


def can_fuse(x_TD: Tensor, ffn: MoEFeedForward) -> bool:
    """Whether the compiled pass computes this input: on a CPU, without gradients, a dtype and activation it knows."""
    if type(x_TD) is not Tensor or x_TD.device.type != "cpu" or x_TD.dtype not in WEIGHTS:
        return False
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if torch.is_grad_enabled() or tracing or torch.is_autocast_enabled("cpu") or ffn.activation not in ACTIVATIONS:
        return False
    same = all(tensor.dtype == x_TD.dtype for tensor in ffn.matrices() if isinstance(tensor, Tensor))
    return same and kernel(x_TD.dtype) is not None


def fused(ffn: MoEFeedForward) -> Matrices:
    """The FFN's matrices with the compiled pass between them."""
    return ffn.matrices()._replace(between=partial(_between, ACTIVATIONS[ffn.activation]))


def _between(
    activation: int,
    start: int,
    gate_TM: Tensor | None,
    up_TM: Tensor,
    gate_bias_M: Tensor | None,
    up_bias_M: Tensor | None,
    weights: Weights | Members | None,
) -> Tensor:
    """h_TM = w act(gate + b) (up + b'), stored by tokens. Raises ValueError for an expert that does not exist."""
    (tokens, neurons), by_neurons = up_TM.shape, not up_TM.is_contiguous()
    gate, up = (None if product is None else product.t() if by_neurons else product for product in (gate_TM, up_TM))
    h_TM = up_TM.new_empty(tokens, neurons) if by_neurons else up_TM
    # References are held until the end.
    held = [None if tensor is None else tensor.contiguous() for tensor in (gate, up, gate_bias_M, up_bias_M)]
    plain, tensors, sizes = neurons, (None, None, None, None), (1, 0, 0, 0)
    if isinstance(weights, Members):
        plain = min(max(0, weights.shared - start), neurons)
        tensors, sizes = _members(weights, start + plain - weights.shared)
    elif weights is not None:
        plain, weight_TN = slice_of(weights, start, start + neurons)
        lines = weight_TN.t() if by_neurons else weight_TN
        lines = (lines if lines.stride(1) == 1 or lines.shape[1] == 1 else lines.contiguous()).to(up_TM.dtype)
        tensors, sizes = (lines, None, None, None), (weights.width, lines.stride(0), 0, 0)
    call = Fused(
        *(None if tensor is None else tensor.data_ptr() for tensor in (*held, *tensors, h_TM)),
        tokens,
        neurons,
        int(by_neurons),
        plain,
        *sizes,
        activation,
        torch.get_num_threads(),
    )
    library = kernel(up_TM.dtype)
    if library is None:
        raise ValueError(ERRORS[2])
    if failed := library.moesaic_fused(ctypes.byref(call)):
        raise ValueError(ERRORS[failed])
    return h_TM


def _members(weights: Members, first: int) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """Tensors and sizes that the kernel takes: of the union's neurons from ``first`` on."""
    idx_TK = weights.idx_TK.to(torch.int64).contiguous()
    weight_TK = None if weights.weight_TK is None else weights.weight_TK.float().contiguous()
    member_EU = weights.member_EU.contiguous()[:, first:]
    return (None, idx_TK, weight_TK, member_EU), (1, member_EU.stride(0), *member_EU.shape[:1], idx_TK.shape[1])
