"""The methods, one line each: name -> what it does. A method is the folder of its name, imported when used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moesaic.errors import InputError

if TYPE_CHECKING:
    from moesaic.methods.base import MethodConfig, MethodModule, ModelMethodModule

METHODS: dict[str, str] = {
    "cmoe": "shared and routed experts from activation patterns, analytic router, no training (arXiv 2502.04416)",
    "mlpmoe": "exact static slicing; Fractal Fade and Compensated Pruning as options; no data (arXiv 2511.21089)",
    "moefication": "balanced k-means on the weight rows, similarity router (arXiv 2110.01786)",
    "llama_moe": "random or contiguous disjoint experts (LLaMA-MoE, arXiv 2406.16554), without its training",
    "tomoe": "overlapping experts and attention pruning learned with frozen weights (ToMoE, arXiv 2501.15316)",
    "token_clusters": "overlapping experts for predictable token groups, top-1, refitted; our own, no training",
    "secret_moe": "shared network and small routed experts, distilled layer by layer (arXiv 2512.18452)",
    "neuron_experts": "every neuron an expert, the FFN's own weights in a few bits as the router; our own, no training",
    "static": "control: keep the neurons of largest mean output energy, no routing",
    "random": "control: random balanced partition with a random linear router",
}


def get_config(name: str) -> type[MethodConfig]:
    """The options of a method, without torch. Raises InputError, listing the names, for an unknown one."""
    return _module(name, "config").Config


def get_method(name: str) -> MethodModule | ModelMethodModule:
    """The ``method`` module of a method. Raises InputError, listing the names, for an unknown one."""
    return _module(name, "method")


def _module(name: str, part: str) -> Any:
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}", f"known: {', '.join(METHODS)}")
    return importlib.import_module(f"moesaic.methods.{name}.{part}")
