"""The `moesaic` architecture: runs of packed neurons, which paths are made of (see `modeling_moesaic.py`).

Axes: T tokens, D model width, P packed neurons, M neurons of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .moesaic_activation import gated

# Measured with benchmarks/ffn.py on a Zen 4 CPU (MKL for fp32, oneDNN for bf16), torch 2.13.
GAP_ROWS = 128  # so many unused rows between two used runs cost less than a second run
WEIGHT_FIRST_UNTIL_FP32 = 5  # tokens below which (W x^T)^T beats x W^T
MATRIX_UNIT = torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]; no public name yet
# The same, tokens from which. Where a CPU has a unit for bf16 matrices, products are over before weights are packed.
WEIGHT_FIRST_FROM_BF16 = 2 if MATRIX_UNIT else 16
TURNED_FROM = 128  # tokens from which turning what lies by neurons costs more than it gains

Matmul = Callable[[Tensor, Tensor], Tensor]


class Matrices(NamedTuple):
    """An FFN's projections as one forward pass uses them: read once, however many slices it takes.

    ``between`` is what stands between the products, where it is not torch: see :func:`hidden`.
    """

    gate_PD: Tensor | None
    gate_bias_P: Tensor | None
    up_PD: Tensor
    up_bias_P: Tensor | None
    down_DP: Tensor
    between: Between | None = None


class Weights(NamedTuple):
    """How neurons count: packed neuron p from ``shared`` on counts ``of_TN[t, (p - shared) // width]`` for token t.

    Those before count 1.
    """

    of_TN: Tensor
    width: int
    shared: int


class Members(NamedTuple):
    """The same for experts that share neurons: p counts the weights of a token's experts that have it."""

    idx_TK: Tensor
    weight_TK: Tensor | None
    member_EU: Tensor
    shared: int


class Between(Protocol):
    """Activations h_TM of the packed neurons from ``start`` on, from products with gate and up, [T, M] each.

    The products are not needed afterwards.
    """

    def __call__(
        self,
        start: int,
        gate_TM: Tensor | None,
        up_TM: Tensor,
        gate_bias_M: Tensor | None,
        up_bias_M: Tensor | None,
        weights: Weights | Members | None,
    ) -> Tensor: ...


def effective_weight(linear: nn.Module) -> Tensor:
    """The matrix that a linear layer stands for, as it is sliced here and never called.

    Parametrised layers (`torch.nn.utils.parametrize`) compute it when `weight` is read. Of a layer that peft has
    wrapped with LoRA it is W + s B A of the active adapters; dropout on their input is not applied.

    Raises TypeError for wrappers whose effect on the matrix is not known.
    """
    if isinstance(linear, nn.Linear):
        return linear.weight
    wrapped: Any = linear
    if not hasattr(wrapped, "lora_A") or not isinstance(wrapped.base_layer, nn.Linear):
        raise TypeError(f"the experts' matrices are sliced: {type(linear).__name__} in place of nn.Linear is not known")
    weight = wrapped.base_layer.weight
    if wrapped._forward_pre_hooks:
        raise TypeError("the experts' matrices are sliced: adapters cannot be chosen by sequence (adapter_names)")
    if wrapped.disable_adapters and wrapped.merged:
        wrapped.unmerge()  # as its own forward does
    if wrapped.disable_adapters or wrapped.merged:
        return weight
    for adapter in wrapped.active_adapters:
        if adapter in getattr(wrapped, "lora_variant", ()) or wrapped.lora_bias.get(adapter):
            raise TypeError("the experts' matrices are sliced: only plain LoRA without bias has a matrix of its own")
        if adapter in wrapped.lora_A:
            weight = weight + wrapped.get_delta_weight(adapter).to(weight.dtype)
    return weight


def hidden(
    matrices: Matrices,
    act: nn.Module,
    x_TD: Tensor,
    start: int,
    stop: int,
    matmul: Matmul = F.linear,
    weights: Weights | Members | None = None,
) -> Tensor:
    """Activations h_TM of the packed neurons [start, stop), times their weights."""
    rows = slice(start, stop)
    gate_PD, gate_bias_P, up_PD, up_bias_P, _, between = matrices
    if between is not None:
        gate_TM = None if gate_PD is None else matmul(x_TD, gate_PD[rows])
        gate_bias_M, up_bias_M = (None if bias is None else bias[rows] for bias in (gate_bias_P, up_bias_P))
        return between(start, gate_TM, matmul(x_TD, up_PD[rows]), gate_bias_M, up_bias_M, weights)
    up_TM = _project(x_TD, up_PD, up_bias_P, rows, matmul)
    h_TM = act(up_TM) if gate_PD is None else gated(act, _project(x_TD, gate_PD, gate_bias_P, rows, matmul), up_TM)
    return h_TM if weights is None else _weighed(h_TM, weights, start)


def slice_of(weights: Weights, start: int, stop: int) -> tuple[int, Tensor]:
    """Of the neurons [start, stop): how many count 1, and the weights of the others' groups."""
    plain = min(max(0, weights.shared - start), stop - start)
    first, last = (place - weights.shared for place in (start + plain, stop))
    return plain, weights.of_TN[:, first // weights.width : -(-last // weights.width)]


def _weighed(h_TM: Tensor, weights: Weights | Members, start: int) -> Tensor:
    assert isinstance(weights, Weights), "torch multiplies by weights of neurons"
    stop = start + h_TM.shape[1]
    plain, weight_TN = slice_of(weights, start, stop)
    if plain == stop - start:
        return h_TM
    own_TNW, weight_TN1 = h_TM[:, plain:].unflatten(1, (-1, weights.width)), weight_TN[:, :, None]
    in_place = not torch.is_grad_enabled()
    if h_TM.dtype == torch.float16:  # what a token did not choose may be infinite
        unwanted_TN1 = weight_TN1 == 0
        own_TNW = own_TNW.masked_fill_(unwanted_TN1, 0) if in_place else own_TNW.masked_fill(unwanted_TN1, 0)
    if in_place:
        own_TNW *= weight_TN1
        return h_TM
    return torch.cat([h_TM[:, :plain], (own_TNW * weight_TN1).flatten(1)], dim=1)


def down(matrices: Matrices, h_TM: Tensor, start: int, stop: int, matmul: Matmul = F.linear) -> Tensor:
    """What the packed neurons [start, stop) with activations h_TM add to the output, [T, D]."""
    return matmul(h_TM, matrices.down_DP[:, start:stop])


def _project(x_TD: Tensor, weight_PD: Tensor, bias_P: Tensor | None, rows: slice, matmul: Matmul) -> Tensor:
    y_TM = matmul(x_TD, weight_PD[rows])
    return y_TM if bias_P is None else y_TM + bias_P[rows]


def _weight_first(x_TD: Tensor, w_MD: Tensor) -> Tensor:
    """x W^T as (W x^T)^T: the library then packs the few tokens and not the weights.

    Not of a down projection that lies side by side with the others (`moesaic_side_by_side.py`): its columns are rows
    in memory, and the library would turn them.
    """
    if w_MD.stride(0) == 1:
        return F.linear(x_TD, w_MD)
    return (w_MD @ x_TD.t()).t()


def _tokens_first(x_TD: Tensor, w_MD: Tensor) -> Tensor:
    return F.linear(x_TD.contiguous(), w_MD)


def matmuls(x_TD: Tensor) -> tuple[Matmul, Matmul]:
    """Products up and down for all tokens and few runs, each in the operand order that is faster for so many tokens."""
    if x_TD.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear, F.linear
    if x_TD.dtype == torch.float32:
        return (_weight_first, _tokens_first) if x_TD.shape[0] < WEIGHT_FIRST_UNTIL_FP32 else (F.linear, F.linear)
    return (_weight_first, _weight_first) if x_TD.shape[0] >= WEIGHT_FIRST_FROM_BF16 else (F.linear, F.linear)
