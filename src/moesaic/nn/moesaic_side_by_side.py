"""The `moesaic` architecture: weights by neurons, as kernels for few tokens read them (see `moesaic_path_rows.py`).

What a token reads of a neuron, its rows of gate and up and its column of down, then lies side by side in one tensor
[P, 3, D] ([P, 2, D] without a gate). The parameters become views of that tensor: nothing is held twice, loading and
moving change it in place, and all other paths compute with it. A state dict is made of ordinary matrices again, and so
is what is trained: optimisers may walk over a parameter's memory without a look at its strides (`fused=True` on a CPU).

Axes: P packed neurons, D model width.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .moesaic_kernel import kernel, part_of

if TYPE_CHECKING:
    from .moesaic_ffn import MoEFeedForward

_LOCK = threading.Lock()


class _Found(NamedTuple):
    """A parameter of an FFN that lies, and where it was."""

    name: str
    layer: nn.Linear
    parameter: str
    tensor: Tensor
    place: int


_FOUND: WeakKeyDictionary[nn.Module, list[_Found]] = WeakKeyDictionary()
"""Of FFNs that lie. Asking for all that may have changed would take as long as a small FFN."""


def layers(ffn: MoEFeedForward) -> list[nn.Linear]:
    """Gate if there is one, up, down."""
    return [layer for layer in (ffn.gate_proj, ffn.up_proj, ffn.down_proj) if layer is not None]


def can_lie(ffn: MoEFeedForward, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether its weights are its own, plain and on the device: not wrapped, quantised, offloaded or shared."""
    if _as_found(ffn, dtype, device):
        return True
    if not _can_lie(ffn, dtype, device):
        return False
    if lies(ffn):
        _FOUND[ffn] = [
            _Found(name, layer, parameter, tensor, tensor.data_ptr())
            for name, layer in ffn.named_children()
            if isinstance(layer, nn.Linear)
            for parameter, tensor in layer.named_parameters()
        ]
    return True


def _as_found(ffn: MoEFeedForward, dtype: torch.dtype, device: torch.device) -> bool:
    found = _FOUND.get(ffn)
    return found is not None and all(
        ffn._modules[name] is layer
        and type(layer) is nn.Linear
        and "_hf_hook" not in layer.__dict__
        and layer._parameters.get(parameter) is tensor
        and tensor.data_ptr() == place
        and (tensor.dtype, tensor.device) == (dtype, device)
        for name, layer, parameter, tensor, place in found
    )


def _can_lie(ffn: MoEFeedForward, dtype: torch.dtype, device: torch.device) -> bool:
    own = layers(ffn)
    if any(type(layer) is not nn.Linear or "_hf_hook" in layer.__dict__ for layer in own):
        return False
    down, rows = own[-1], own[:-1]
    shape, down_DP = torch.Size((ffn.neurons, rows[0].in_features)), down.weight
    weights = [layer.weight for layer in rows]
    if down_DP.shape != shape[::-1] or any(weight.shape != shape for weight in weights):
        return False
    tensors = [*weights, down_DP, *(layer.bias for layer in rows if layer.bias is not None)]
    if any(type(tensor) is not nn.Parameter or (tensor.dtype, tensor.device) != (dtype, device) for tensor in tensors):
        return False
    if any(tensor.is_inference() for tensor in tensors):  # made for one pass, as in a calibration: laying would not pay
        return False
    return lies(ffn) or not any(tensor.is_cpu and tensor.is_shared() for tensor in tensors)  # on GPUs all say so


def lies(ffn: MoEFeedForward) -> bool:
    """Whether what a neuron has in each matrix lies in one piece, so that the kernel can read it."""
    gate = None if ffn.gate_proj is None else ffn.gate_proj.weight
    return lie(gate, ffn.up_proj.weight, ffn.down_proj.weight)


def lie(gate_PD: Tensor | None, up_PD: Tensor, down_DP: Tensor) -> bool:
    """:func:`lies` of the matrices."""
    return (gate_PD is None or _in_pieces(gate_PD, 1)) and _in_pieces(up_PD, 1) and _in_pieces(down_DP, 0)


def _in_pieces(weight: Tensor, dim: int) -> bool:
    return weight.stride(dim) == 1 or weight.shape[dim] == 1


def lay(ffn: MoEFeedForward) -> None:
    """Lay the weights side by side. One matrix after the other is given up, so that memory grows by one FFN at most."""
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        if lies(ffn):  # another thread was faster
            return
        own = layers(ffn)
        up = ffn.up_proj.weight
        side_PND = torch.empty(ffn.neurons, len(own), up.shape[1], dtype=up.dtype, device=up.device)
        if up.is_cpu and (library := kernel(up.dtype, part_of(ffn.layout))) is not None:
            library.moesaic_large_pages(side_PND.data_ptr(), side_PND.nbytes)
        for place, layer in enumerate(own):
            rows_PD = side_PND[:, place]
            view = rows_PD.t() if layer is ffn.down_proj else rows_PD
            layer.weight.data = view.copy_(layer.weight.data)


def take_apart(ffn: MoEFeedForward) -> None:
    """Undo :func:`lay`: every matrix has contiguous memory of its own again, whatever it was wrapped in since."""
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        for name, tensor in ffn.named_parameters():
            if "proj" in name and not tensor.is_contiguous():
                tensor.data = tensor.data.contiguous()


def ready_to_train(ffn: MoEFeedForward) -> None:
    """:func:`take_apart` before a pass with gradients of the weights."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    weight = ffn.up_proj._parameters.get("weight")
    if weight is not None and weight.requires_grad and not weight.is_contiguous():
        take_apart(ffn)
