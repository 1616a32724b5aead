"""A second device without hardware: computed on the CPU, but of another kind, and what mixes both fails as on a GPU.

torch's fake tensors know devices too, but have no values, which routing asks for. It changes torch for the whole
process, so it is imported in processes of their own (`tests/children.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")
torch.elsewhere.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]
HERE, ELSEWHERE = torch.device("cpu"), torch.device("elsewhere:0")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
TO_PYTHON = (torch.ops.aten._local_scalar_dense.default,)


def _without_gradients(self: Any) -> None:
    self._inference_mode_context = torch.no_grad()
    self._inference_mode_context.__enter__()


# Tensors of inference mode have no version counter, which tensors around tensors must have.
torch.inference_mode.__enter__ = _without_gradients  # type: ignore[method-assign]


class Elsewhere(Tensor):
    """A tensor on the other device; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=ELSEWHERE
        )
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_its_device(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Elsewhere) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def tolist(self) -> Any:
        return self.held.tolist()


class TwoDevices(TorchDispatchMode):
    """Within the block, tensors can be made and moved elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_its_device(func, args, kwargs or {})


def on_its_device(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU and claim the device that it is asked for, or that of the tensors.

    Raises:
        RuntimeError: tensors on both devices. Numbers (of no dimension) on the CPU may be mixed in, as with GPUs.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    elsewhere = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    here = any(not isinstance(tensor, Elsewhere) and tensor.dim() > 0 for tensor in tensors)
    if elsewhere and here and func not in COPIES:
        raise RuntimeError(f"{func} of tensors on two devices")
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if func._schema.is_mutable and func._schema.name.endswith("_"):
        return args[0] if func._schema.returns else None  # lists of tensors are changed and nothing returned
    asked = kwargs.get("device")
    there = elsewhere if asked is None else torch.device(asked).type == ELSEWHERE.type
    if not there or func in TO_PYTHON:
        return out
    return tree_map(lambda value: Elsewhere(value) if isinstance(value, Tensor) else value, out)


def _held(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == ELSEWHERE.type:
        return HERE
    return value.held if isinstance(value, Elsewhere) else value
