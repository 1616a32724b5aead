"""The dense architecture itself with fewer neurons: for FFNs whose every expert is always on, and for pruned ones.

The FFN of such a layer is a dense one with its neurons in another order; neurons of zeros are dropped, and layers that
are narrower than the widest are filled up with zeros. Every engine that runs the dense model runs this.

Axes: D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.anatomy.base import FFNSite
from moesaic.targets import common
from moesaic.targets.base import Packed, Split, TargetOptions
from moesaic.targets.limits import stock_attention_reasons

files = common.no_files
factor = common.times_one
_PACKED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def reasons(split: Split) -> list[str]:
    """See :class:`TargetModule`."""
    if split.anatomy.family.moe is not None:
        return ["the experts of a MoE were split: they differ in width, which its own architecture cannot hold"]
    found = stock_attention_reasons(split)
    routed = [path for path, plan in split.plans.items() if plan.router.kind != "static"]
    if routed:
        found.append(f"{routed[0]} chooses experts per token (one of {len(routed)} FFNs that do): a dense FFN cannot")
    # In every family, an FFN with a bias on its input has one on its output.
    biased = [path for path, plan in split.plans.items() if plan.bias is not None and not split.specs[path]["up_bias"]]
    if biased:
        found.append(f"{biased[0]}: the FFN's output has a bias, the dense model's has none: target moesaic holds it")
    return found


def exact(split: Split, options: TargetOptions) -> bool:
    """See :class:`TargetModule`."""
    return True


def config_json(split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
    """See :class:`TargetModule`."""
    return {**split.anatomy.config, split.anatomy.family.d_ff: _width(split), "moesaic": dict(provenance)}


def layer_tensors(
    split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
) -> dict[str, Tensor]:
    """See :class:`TargetModule`."""
    tensors = dict(copied)
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
        return tensors
    else:
        parts = _read(tensors, site)
    width = _width(split)
    return tensors | _write({key: _pad(tensor, key, width) for key, tensor in parts.items()}, site)


def rest_tensors(split: Split, copied: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """See :class:`TargetModule`."""
    return dict(copied)


def _width(split: Split) -> int:
    """Neurons of the widest FFN."""
    whole = [site.d_ff for site in split.anatomy.sites if site.path not in split.plans]
    return max([*whole, *(int((plan.packed >= 0).sum()) for plan in split.plans.values())])


def _take(tensor: Tensor, role: str, kind: str, real_P: Tensor) -> Tensor:
    if role != "down":
        return tensor[real_P]
    return tensor[:, real_P] if kind == "weight" else tensor


def _pad(tensor: Tensor, key: str, width: int) -> Tensor:
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
