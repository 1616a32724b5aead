"""The dense architecture itself with fewer neurons: for FFNs whose every expert is always on, and for pruned ones.

The FFN of such a layer is a dense one with its neurons in another order; neurons of zeros are dropped, and layers that
are narrower than the widest are filled up with zeros. Every engine that runs the dense model runs this.

Axes: D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesaic.anatomy.base import FFNSite
from moesaic.blueprint.shape import FFNShape
from moesaic.targets.base import Packed, Split, Target, TargetOptions
from moesaic.targets.reasons import own_reasons

if TYPE_CHECKING:
    from torch import Tensor

_PACKED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class Dense(Target):
    """See the file's own text."""

    def split_reasons(self, split: Split) -> list[str]:
        """See :class:`Target`."""
        if split.anatomy.family.moe is not None:
            return ["the experts of a MoE were split: they differ in width, which its own architecture cannot hold"]
        found = own_reasons(split)
        routed = [path for path, shape in split.shapes.items() if shape.router != "static"]
        if routed:
            found.append(
                f"{routed[0]} chooses experts per token (one of {len(routed)} FFNs that do): a dense FFN cannot"
            )
        # In every family, an FFN with a bias on its input has one on its output.
        added = [path for path, shape in split.shapes.items() if shape.output_bias and not split.specs[path]["up_bias"]]
        if added:
            found.append(
                f"{added[0]}: the FFN's output has a bias, the dense model's has none: target moesaic holds it"
            )
        return found

    def stored(self, shape: FFNShape, split: Split, options: TargetOptions) -> tuple[int, int]:
        """See :class:`Target`."""
        return min(shape.neurons, shape.d_ff), 0

    def config_json(self, split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
        """See :class:`Target`."""
        return {**split.anatomy.config, split.anatomy.family.d_ff: _width(split), "moesaic": dict(provenance)}

    def layer_tensors(
        self, split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
    ) -> dict[str, Tensor]:
        """See :class:`Target`."""
        made = dict(copied)
        (site,) = split.anatomy.sites_of(layer)
        if site.path in packed:
            real_P = split.plans[site.path].packed >= 0
            parts = {
                f"{role}.{kind}": _take(tensor, role, kind, real_P)
                for role, name in _PACKED.items()
                for kind in ("weight", "bias")
                if (tensor := packed[site.path].get(f"{name}.{kind}")) is not None
            }
        elif _width(split) == site.d_ff:
            return made
        else:
            parts = _read(made, site)
        width = _width(split)
        return made | _write({key: _pad(tensor, key, width) for key, tensor in parts.items()}, site)


TARGET = Dense(
    name="dense",
    summary="the dense architecture itself with fewer neurons, for FFNs without routing",
    engines=("whatever loads the dense model",),
)


def _width(split: Split) -> int:
    """Neurons of the widest FFN."""
    whole = [site.d_ff for site in split.anatomy.sites if site.path not in split.plans]
    return max([*whole, *(int((plan.packed >= 0).sum()) for plan in split.plans.values())])


def _take(tensor: Tensor, role: str, kind: str, real_P: Tensor) -> Tensor:
    if role != "down":
        return tensor[real_P]
    return tensor[:, real_P] if kind == "weight" else tensor


def _pad(tensor: Tensor, key: str, width: int) -> Tensor:
    from torch.nn import functional as F

    if key == "down.bias":
        return tensor
    if key == "down.weight":
        return F.pad(tensor, (0, width - tensor.shape[1]))
    return F.pad(tensor, (*(0, 0) * (tensor.dim() - 1), 0, width - tensor.shape[0]))


def _read(tensors: dict[str, Tensor], site: FFNSite) -> dict[str, Tensor]:
    """Take a dense FFN out of a layer's tensors, as matrices [F, D] and [D, F] however they are stored."""
    parts: dict[str, Tensor] = {}
    for role, base in site.tensor_names().items():
        for kind in ("weight", "bias"):
            if (tensor := tensors.pop(f"{base}.{kind}", None)) is not None:
                parts[f"{role}.{kind}"] = tensor.T if site.names.transposed and kind == "weight" else tensor
    if site.names.fused:
        for kind in ("weight", "bias"):
            if (tensor := parts.pop(f"up.{kind}", None)) is not None:
                parts[f"gate.{kind}"], parts[f"up.{kind}"] = tensor.chunk(2)
    return parts


def _write(parts: dict[str, Tensor], site: FFNSite) -> dict[str, Tensor]:
    """The inverse of :func:`_read`, in memory of its own."""
    import torch

    parts = dict(parts)
    if site.names.fused:
        for kind in ("weight", "bias"):
            if (gate := parts.pop(f"gate.{kind}", None)) is not None:
                parts[f"up.{kind}"] = torch.cat([gate, parts[f"up.{kind}"]])
    bases = site.tensor_names()
    written = {}
    for key, tensor in parts.items():
        role, _, kind = key.partition(".")
        stored = tensor.T if site.names.transposed and kind == "weight" else tensor
        written[f"{bases[role]}.{kind}"] = stored.clone(memory_format=torch.contiguous_format)
    return written
