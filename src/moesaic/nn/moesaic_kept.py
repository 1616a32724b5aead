"""The `moesaic` architecture: what is computed once from a module's tensors (see `moesaic_low_bit.py`).

It stands in no state dict, is neither copied nor pickled with the module, and goes when the module goes or changes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

FEW = 16
"""Tokens up to which what was made is kept for the next ones: with more, making it anew costs little beside them."""


class _Made(NamedTuple):
    """What was made, and of which tensors. Aliases hold their memory, so that no other tensor can lie there."""

    sources: list[Tensor]
    aliases: list[Tensor]
    versions: list[int]
    result: Any


_MADE: WeakKeyDictionary[nn.Module, dict[Hashable, _Made]] = WeakKeyDictionary()


def kept(module: nn.Module, key: Hashable, tokens: int, make: Callable[[], Any]) -> Any:
    """What ``make`` makes of the module's buffers, without gradients: made before, if they have not changed.

    It is kept in eval mode on a CPU for up to ``FEW`` tokens. In training mode, and while a model is traced, it is made
    each time.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return make()
    sources = list(module.buffers())
    if module.training or not all(_followed(tensor) for tensor in sources):
        _MADE.pop(module, None)
        return make()
    of_module = _MADE.setdefault(module, {})
    found = of_module.get(key)
    if found is not None and _holds(found, sources):
        return found.result
    of_module.pop(key, None)  # given up before the next is made
    found = None
    if tokens > FEW:
        return make()
    with torch.inference_mode(False), torch.no_grad():
        aliases, versions = [tensor.detach() for tensor in sources], [tensor._version for tensor in sources]
        of_module[key] = _Made(sources, aliases, versions, result := make())
    return result


def _followed(tensor: Tensor) -> bool:
    """Whether a change of it shows in its version, and what is made of it would lie in the same memory."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and not tensor.is_inference()


def _holds(made: _Made, sources: list[Tensor]) -> bool:
    return len(sources) == len(made.sources) and all(
        tensor is source and tensor.data_ptr() == alias.data_ptr() and tensor._version == version
        for tensor, source, alias, version in zip(sources, made.sources, made.aliases, made.versions, strict=True)
    )
