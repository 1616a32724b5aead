"""The `moesaic` architecture: the paths of GPUs, which Triton compiles (see `moesaic_paths.py`, `moesaic_triton.py`).

Nothing here waits for the device: which rows are read is decided there. Triton is imported when a path first runs.

Axes: T tokens, D model width, P packed neurons, E routed experts, K experts per token, N pairs of a token and an expert
that it chose, M neurons of one expert, S parts of a sum.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .moesaic_kernel import ACTIVATIONS, WEIGHTS
from .moesaic_side_by_side import can_lie, lay, lies

if TYPE_CHECKING:
    from .moesaic_ffn import MoEFeedForward

# Sizes of blocks. They were chosen by reasoning and measured on no GPU.
FEW_TOKENS = 64  # of one block of the path for few tokens, at most
FEW_ROWS, ONE_WIDTH, FEW_WIDTH = 16, 128, 64  # neurons there, inputs for one token, and for several
SUM_ROWS, SUM_WIDTH = 32, 64  # neurons and outputs of a block, on the way down
PARTS = 512  # programs on the way down, about: several for each processor of a large GPU
MANY_TOKENS = 64  # of one expert in a block of the grouped path, at most
MANY_ROWS, MANY_WIDTH = 64, 32
LEAST = 16  # that Triton multiplies


@cache
def devices() -> frozenset[str]:
    """Kinds of devices that Triton's kernels run on; with ``TRITON_INTERPRET=1`` its interpreter runs them on CPUs."""
    if find_spec("triton") is None:
        return frozenset()
    return frozenset({"cuda", "xpu", *(["cpu"] if os.environ.get("TRITON_INTERPRET") == "1" else [])})


def usable(x_TD: Tensor, ffn: MoEFeedForward) -> bool:
    """Whether the kernels can compute it: device, dtype, activation, no gradients, no tracing, one device for all."""
    kind = x_TD.device.type
    if type(x_TD) is not Tensor or x_TD.dtype not in WEIGHTS or kind not in devices() or not ffn.routed:
        return False
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if torch.is_grad_enabled() or tracing or torch.is_autocast_enabled(kind) or ffn.activation not in ACTIVATIONS:
        return False
    own: list[Any] = [layer for layer in (ffn.gate_proj, ffn.up_proj, ffn.down_proj) if layer is not None]
    if any(type(layer) is not nn.Linear and not hasattr(layer, "lora_A") for layer in own):  # parametrised, quantised
        return False
    return all((layer.weight.dtype, layer.weight.device) == (x_TD.dtype, x_TD.device) for layer in own)


class TritonRows:
    """For few tokens: each wanted neuron is read once for all of them, others are not read.

    At its first use an FFN's weights are laid side by side where they may be (`moesaic_side_by_side.py`).
    """

    name = "triton_rows"

    def __init__(self, layout: str) -> None:
        self.layout = layout

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return usable(x_TD, ffn)

    def run(self, ffn: Any, x_TD: Tensor) -> Tensor:
        if can_lie(ffn, x_TD.dtype, x_TD.device) and not lies(ffn):
            lay(ffn)
        return rows(ffn, x_TD, *ffn.choice(x_TD))


class TritonGrouped:
    """For many tokens: sorted by expert, each expert multiplies its own in tiles. Neurons are found by index."""

    name = "triton_grouped"

    def __init__(self, layout: str) -> None:
        self.layout = layout

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return usable(x_TD, ffn)

    def run(self, ffn: Any, x_TD: Tensor) -> Tensor:
        return grouped(ffn, x_TD, *ffn.choice(x_TD))


def rows(ffn: Any, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """y_TD of the shared neurons and those of the chosen experts. An expert that does not exist has no neurons.

    Raises:
        ValueError: sizes that the FFN does not have.
    """
    matrices = ffn.matrices()
    x_TD, idx_TK, weight_TK, member_EU = _checked(ffn, matrices, x_TD, idx_TK, weight_TK)
    (tokens, d_model), neurons, gate = x_TD.shape, ffn.neurons, matrices.gate_PD
    block = 1 if tokens == 1 else min(FEW_TOKENS, _power(tokens))
    # Products of fp32 are not the tensor cores': a block has to fit into registers.
    width = ONE_WIDTH if block == 1 else FEW_WIDTH * 2 // x_TD.element_size()
    h_TP = torch.empty(tokens, neurons, dtype=torch.float32, device=x_TD.device)
    across = -(-d_model // SUM_WIDTH)
    each = max(SUM_ROWS, -(-neurons * across // PARTS))
    each = -(-each // SUM_ROWS) * SUM_ROWS
    y_STD = torch.empty(-(-neurons // each), tokens, d_model, dtype=torch.float32, device=x_TD.device)
    blocks = -(-tokens // block)
    kernels = _kernels()
    with _on(x_TD.device):
        kernels.rows_hidden[-(-neurons // FEW_ROWS), blocks](
            *(x_TD, gate, matrices.up_PD, matrices.gate_bias_P, matrices.up_bias_P),
            *(idx_TK, weight_TK, member_EU, h_TP),
            *(tokens, d_model, neurons, ffn.shared, ffn.experts, ffn.width, idx_TK.shape[1]),
            *((0, 0) if gate is None else gate.stride()),
            *matrices.up_PD.stride(),
            ACTIVATION=ACTIVATIONS[ffn.activation],
            GATED=gate is not None,
            UNION=member_EU is not None,
            **{"BLOCK_T": block, "BLOCK_P": FEW_ROWS, "BLOCK_D": width, "WIDE": x_TD.is_cpu},
        )
        kernels.rows_down[across, len(y_STD), blocks](
            *(h_TP, matrices.down_DP, y_STD, tokens, d_model, neurons, each),
            *reversed(matrices.down_DP.stride()),
            **{"BLOCK_T": block, "BLOCK_P": SUM_ROWS, "BLOCK_D": SUM_WIDTH, "WIDE": x_TD.is_cpu},
        )
    return y_STD.sum(0).to(x_TD.dtype)


def grouped(ffn: Any, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """As :func:`rows`; the shared neurons are torch's."""
    matrices = ffn.matrices()
    x_TD, idx_TK, weight_TK, member_EU = _checked(ffn, matrices, x_TD, idx_TK, weight_TK)
    places_R, place_of_E, widest = (None, None, ffn.width) if member_EU is None else _places(ffn)
    (tokens, top_k), d_model, gate = idx_TK.shape, x_TD.shape[1], matrices.gate_PD
    pairs = tokens * top_k
    block = min(MANY_TOKENS, _power(pairs // ffn.experts))
    order_N, tiles = _tiles(idx_TK.flatten(), ffn.experts, block)
    h_NM = x_TD.new_empty(pairs, widest)
    y_ND = x_TD.new_zeros(pairs, d_model)  # what a pair of no expert adds
    union, indices = member_EU is not None, (*tiles, places_R, place_of_E)
    kernels = _kernels()
    with _on(x_TD.device):
        kernels.grouped_hidden[len(tiles.expert), -(-widest // MANY_ROWS)](
            *(x_TD, gate, matrices.up_PD, matrices.gate_bias_P, matrices.up_bias_P, order_N, weight_TK, h_NM, *indices),
            *(d_model, ffn.shared, ffn.width, widest, top_k),
            *((0, 0) if gate is None else gate.stride()),
            *matrices.up_PD.stride(),
            ACTIVATION=ACTIVATIONS[ffn.activation],
            GATED=gate is not None,
            UNION=union,
            **{"BLOCK_N": block, "BLOCK_M": MANY_ROWS, "BLOCK_D": MANY_WIDTH, "WIDE": x_TD.is_cpu},
        )
        kernels.grouped_down[len(tiles.expert), -(-d_model // MANY_ROWS)](
            *(h_NM, matrices.down_DP, y_ND, order_N, *indices, d_model, ffn.shared, ffn.width, widest),
            *reversed(matrices.down_DP.stride()),
            UNION=union,
            **{"BLOCK_N": block, "BLOCK_M": MANY_WIDTH, "BLOCK_D": MANY_ROWS, "WIDE": x_TD.is_cpu},
        )
    y_TD = y_ND.unflatten(0, (tokens, top_k)).sum(1)
    return y_TD + ffn.rows(matrices, x_TD, 0, ffn.shared) if ffn.shared else y_TD


class Tiles(NamedTuple):
    """Blocks of pairs of one expert each, of which some may be empty: expert, first pair, and behind the last."""

    expert: Tensor
    first: Tensor
    stop: Tensor


def _tiles(expert_N: Tensor, experts: int, block: int) -> tuple[Tensor, Tiles]:
    """The pairs' order by expert, and as many tiles as there can be: how many are needed only the device knows."""
    sorted_N, order_N = expert_N.sort(stable=True)
    every_E = torch.arange(experts, device=expert_N.device)
    begin_E, end_E = torch.searchsorted(sorted_N, every_E), torch.searchsorted(sorted_N, every_E, right=True)
    tiles_E = (end_E - begin_E + block - 1) // block
    last_E = tiles_E.cumsum(0)
    tile = torch.arange(len(expert_N) // block + experts, device=expert_N.device)
    found = torch.searchsorted(last_E, tile, right=True)
    expert = found.clamp(max=experts - 1)
    first = begin_E[expert] + (tile - (last_E - tiles_E)[expert]) * block
    return order_N, Tiles(expert, first, torch.where(found < experts, end_E[expert], 0))


def _places(ffn: Any) -> tuple[Tensor, Tensor, int]:
    """Of a union: all experts' neurons, one expert after the other, where each expert's begin, and the most of one."""
    neurons = ffn.places()[0]
    begins = F.pad(ffn.membership.sum(1).cumsum(0), (1, 0))
    return torch.cat(neurons), begins, max(len(own) for own in neurons)


def _checked(
    ffn: Any, matrices: Any, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the kernels read, contiguous; the table of members of a union as bytes."""
    up_PD, down_DP = matrices.up_PD, matrices.down_DP
    shape = torch.Size((ffn.neurons, x_TD.shape[1]))
    if up_PD.shape != shape or down_DP.shape != shape[::-1]:
        raise ValueError(f"inputs of width {shape[1]} for matrices of {tuple(up_PD.shape)} and {tuple(down_DP.shape)}")
    if len(idx_TK) != len(x_TD) or (weight_TK is not None and weight_TK.shape != idx_TK.shape):
        raise ValueError(f"choices for {len(idx_TK)} of {len(x_TD)} tokens, or other weights than choices")
    member_EU = ffn.membership if ffn.layout == "union" else None
    if member_EU is None and ffn.shared + ffn.experts * ffn.width > ffn.neurons:
        raise ValueError(f"{ffn.experts} experts of {ffn.width} neurons are more than {ffn.neurons}")
    if member_EU is not None and member_EU.shape != (ffn.experts, ffn.neurons - ffn.shared):
        raise ValueError(f"a table of members of the shape {tuple(member_EU.shape)}")
    return (
        x_TD.contiguous(),
        idx_TK.to(torch.int64).contiguous(),
        None if weight_TK is None else weight_TK.contiguous(),
        None if member_EU is None else member_EU.contiguous().view(torch.uint8),
    )


def _kernels() -> Any:
    """The file of the kernels, which imports Triton."""
    return import_module(".moesaic_triton", __package__)


def _power(number: int) -> int:
    """The next power of two, at least what Triton multiplies."""
    return max(LEAST, 1 << max(0, number - 1).bit_length())


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
