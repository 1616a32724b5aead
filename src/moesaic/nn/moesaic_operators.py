"""The `moesaic` architecture: the kernel as operators of torch, for `torch.compile` (see `moesaic_path_rows.py`).

Compiled programs cannot look into a foreign function. They call an operator and know the shape of its result. Without
`torch.compile` the paths call the kernel themselves: torch takes longer to find an operator than to compute neurons.

The same files may be loaded twice, as a package and from a checkpoint's folder. Of equal sources they share operators.

Axes: T tokens, D model width, P packed neurons, F neurons, E experts, K experts per token.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .moesaic_kernel import SOURCE, WEIGHTS, kernel, part_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from .moesaic_ffn import MoEFeedForward

NAMESPACE = f"moesaic_{hashlib.sha256(SOURCE.encode()).hexdigest()[:8]}"

_LIBRARIES: list[torch.library.Library] = []
"""Operators live as long as what has defined them."""
MATRICES = "Tensor? gate_PD, Tensor up_PD, Tensor down_DP, Tensor? gate_bias_P, Tensor? up_bias_P"


def operator(name: str, arguments: str, function: Callable[..., Tensor]) -> Any:
    """``function`` as an operator of x_TD and of ``arguments``, in torch's schema language; y_TD is what it returns."""
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        # Not by `torch.library.custom_op`: what that puts around a function takes as long as the function.
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
        library.define(f"{name}(Tensor x_TD, {arguments}) -> Tensor", tags=(torch.Tag.needs_exact_strides,))
        library.impl(name, function, "CPU")
        shape = torch.library.register_fake(f"{NAMESPACE}::{name}", lib=library)
        shape(lambda x_TD, *_: torch.empty_like(x_TD, memory_format=torch.contiguous_format))
        _LIBRARIES.append(library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def can_be_called(x_TD: Tensor, ffn: MoEFeedForward, lies: bool) -> bool:
    """Whether an operator can stand for this FFN in what is being compiled. The kernel's own conditions come on top.

    ``lies``: whether the weights lie side by side, as they do after a first token; they cannot be laid meanwhile.
    """
    layers = [layer for layer in (ffn.gate_proj, ffn.up_proj, ffn.down_proj) if layer is not None]
    plain = all(type(layer) is nn.Linear and layer.weight.dtype == x_TD.dtype for layer in layers)
    return plain and lies and compiles(x_TD.dtype, part_of(ffn.layout))


def compiles(dtype: torch.dtype, part: str) -> bool:
    """Whether operators can be called in what is being compiled: not in exported programs, nor without the kernel."""
    inside = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    return inside and _is_there(str(dtype), part)


@torch.compiler.assume_constant_result
def _is_there(dtype: str, part: str) -> bool:
    return kernel(next(known for known in WEIGHTS if str(known) == dtype), part) is not None
