"""The target architectures: name -> what it is and which engines load it. A target is the file of its name, imported
when used."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesaic.errors import InputError

if TYPE_CHECKING:
    from moesaic.targets.base import Split, TargetModule, TargetOptions


@dataclass(frozen=True)
class TargetInfo:
    """A target in one line, and the software that loads its folders with no code of ours."""

    summary: str
    engines: tuple[str, ...]


TARGETS: dict[str, TargetInfo] = {
    "glm4_moe": TargetInfo(
        "the universal one: shared expert, sigmoid router, leading dense layers", ("transformers", "vLLM", "SGLang")
    ),
    "granitemoeshared": TargetInfo(
        "shared expert of any width, softmax over the chosen; Granite's multipliers", ("transformers", "vLLM", "SGLang")
    ),
    "qwen2_moe": TargetInfo(
        "shared expert behind a gate, dense layers anywhere",
        ("transformers", "vLLM", "SGLang", "llama.cpp's converter"),
    ),
    "qwen3_moe": TargetInfo(
        "no shared expert, norms on queries and keys, dense layers anywhere",
        ("transformers", "vLLM", "SGLang", "llama.cpp's converter"),
    ),
    "mixtral": TargetInfo(
        "no shared expert; sliding window", ("transformers", "vLLM", "SGLang", "llama.cpp's converter")
    ),
    "flex_olmo": TargetInfo("no shared expert; OLMo 2's norms", ("transformers", "vLLM")),
    "ernie4_5_moe": TargetInfo(
        "shared expert, biases on attention and on the FFN's output, correction bias", ("transformers", "vLLM")
    ),
    "dense": TargetInfo(
        "the dense architecture itself with fewer neurons, for FFNs without routing",
        ("whatever loads the dense model",),
    ),
    "moesaic": TargetInfo(
        "holds every blueprint; transformers with moesaic or trust_remote_code",
        ("transformers with our modelling file",),
    ),
}
AUTO = "auto"
REPLICATING = ("mixtral", "qwen3_moe", "flex_olmo")
"""Targets without a shared expert: they copy the shared neurons into every routed one."""
_AUTO_ORDER = (
    "dense",
    "glm4_moe",
    "granitemoeshared",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "flex_olmo",
    "ernie4_5_moe",
)


def get_target(name: str) -> TargetModule:
    """The module of a target. Raises InputError, listing the names, for an unknown one."""
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}", f"known: {AUTO}, {', '.join(TARGETS)}")
    return importlib.import_module(f"moesaic.targets.{name}")  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Choice:
    """The target that was chosen, and why those before it were not: name -> reasons."""

    name: str
    module: TargetModule
    refused: dict[str, list[str]]


def choose_target(split: Split, name: str = AUTO, options: TargetOptions | None = None) -> Choice:
    """The target to write.

    ``auto`` takes the first stock architecture that holds the model and computes no more per token than the dense FFN,
    and ``moesaic``, which holds everything, when there is none. Architectures without a shared expert come first where
    the split has none, as elsewhere a shared expert of zeros would be computed. With ``options``, ``auto`` passes over
    targets that would, under these options, only approach the split's function. Experts stored as a union stay one:
    ``moesaic``; named, a stock architecture gets a copy per expert.

    Raises:
        InputError: the target is unknown, or ``name`` is given and cannot hold the model, or none can; the message has
            all reasons.
    """
    if name != AUTO:
        module = get_target(name)
        if reasons := module.reasons(split):
            if name == "moesaic":
                raise InputError(f"no target can hold this model: {'; '.join(reasons)}")
            fits = choose_target(split, AUTO, options).name
            raise InputError(f"target {name} cannot hold this model: {'; '.join(reasons)}", f"use --target {fits}")
        return Choice(name, module, {})
    union = any(plan.union for plan in split.plans.values())
    refused: dict[str, list[str]] = {}
    for candidate in _auto_order(split):
        module = get_target(candidate)
        reasons = module.reasons(split)
        if not reasons and union:
            reasons = ["it would copy experts that are stored as a union; naming the target accepts that"]
        if not reasons and candidate in REPLICATING:
            reasons = _too_costly(split)
        if not reasons and options is not None and not module.exact(split, options):
            reasons = ["its routers only approach weights of 1; naming the target accepts that"]
        if not reasons:
            return Choice(candidate, module, refused)
        refused[candidate] = reasons
    module = get_target("moesaic")
    if reasons := module.reasons(split):
        raise InputError(f"no target can hold this model: {'; '.join(reasons)}")
    return Choice("moesaic", module, refused)


def _auto_order(split: Split) -> list[str]:
    if any(len(plan.shared) for plan in split.plans.values()):
        return list(_AUTO_ORDER)
    return sorted(_AUTO_ORDER, key=lambda name: name not in ("dense", *REPLICATING))


def _too_costly(split: Split) -> list[str]:
    """Reasons against copying the shared neurons into every expert."""
    for path, plan in split.plans.items():
        active = plan.top_k * (len(plan.shared) + plan.expert_width)
        if len(plan.shared) and active > plan.d_ff:
            return [
                f"it has no shared expert: with the shared neurons in each of the {plan.top_k} active experts, "
                f"{path} would compute {active} neurons per token, dense has {plan.d_ff}"
            ]
    return []
