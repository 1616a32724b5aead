"""The target architectures, by name, and the choice among them. A target is the file of its name. No torch here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moesaic.errors import InputError
from moesaic.targets.base import Split, Target, TargetOptions

_NAMES = (
    "glm4_moe",
    "granitemoeshared",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "flex_olmo",
    "ernie4_5_moe",
    "dense",
    "moesaic",
)
TARGETS: dict[str, Target] = {name: importlib.import_module(f"{__name__}.{name}").TARGET for name in _NAMES}
"""By name; the stock ones in the order in which ``auto`` tries them."""
AUTO = "auto"
OWN = "moesaic"
"""The target that holds everything."""


def get_target(name: str) -> Target:
    """The target of a name. Raises InputError, listing the names, for an unknown one."""
    if name not in TARGETS:
        raise InputError(f"unknown target {name!r}", f"known: {AUTO}, {', '.join(TARGETS)}")
    return TARGETS[name]


@dataclass(frozen=True)
class Choice:
    """The target that was chosen, and why those before it were not: name -> reasons."""

    target: Target
    refused: dict[str, list[str]]

    @property
    def name(self) -> str:
        """The chosen target's name."""
        return self.target.name


def choose_target(
    split: Split, name: str = AUTO, options: TargetOptions | None = None, *, keep_experts: bool = False
) -> Choice:
    """The target to write. Imports transformers.

    ``auto`` takes the first stock architecture that holds the model and computes no more per token than the dense FFN,
    and ``moesaic``, which holds everything, when there is none. Architectures without a shared expert come first where
    the split has none, as elsewhere a shared expert of zeros would be computed. With ``options``, ``auto`` passes over
    targets that would, under these options, only approach the split's function. Experts stored as a union stay one:
    ``moesaic``; named, a stock architecture gets a copy per expert. ``keep_experts``: ``auto`` makes no dense FFN again
    of experts that are always on.

    Raises:
        InputError: the target is unknown, or ``name`` is given and cannot hold the model, or none can; the message has
            all reasons.
    """
    if name != AUTO:
        target = get_target(name)
        if reasons := target.reasons(split):
            if name == OWN:
                raise InputError(f"no target can hold this model: {'; '.join(reasons)}")
            refuse(name, reasons, f"use --target {choose_target(split, AUTO, options).name}")
        return Choice(target, {})
    return _choose(split, options, keep_experts, lambda target: target.reasons(split))


def common_reasons(refused: Mapping[str, list[str]]) -> list[str]:
    """Of the reasons against each target, by its name, those that speak against every stock one."""
    against = [reasons for name, reasons in refused.items() if get_target(name).stock]
    return [reason for reason in against[0] if all(reason in others for others in against)] if against else []


def refuse(name: str, reasons: list[str], hint: str) -> None:
    """Raise InputError where there are ``reasons`` against the target ``name``."""
    if reasons:
        raise InputError(f"target {name} cannot hold this model: {'; '.join(reasons)}", hint)


def likely_target(split: Split, name: str, options: TargetOptions) -> str:
    """What ``choose_target(split, name, options, keep_experts=True)`` will take, as far as it shows without
    transformers."""
    if name != AUTO:
        return name
    return _choose(split, options, True, lambda target: target.split_reasons(split)).name


def _choose(
    split: Split, options: TargetOptions | None, keep_experts: bool, judge: Callable[[Target], list[str]]
) -> Choice:
    refused: dict[str, list[str]] = {}
    for target in _auto_order(split):
        reasons = judge(target)
        if not reasons and any(shape.union is not None for shape in split.shapes.values()):
            reasons = ["it would copy experts that are stored as a union; naming the target accepts that"]
        if not reasons and target.replicates:
            reasons = _too_costly(split)
        if not reasons and options is not None and not target.exact(split, options):
            reasons = ["its routers only approach weights of 1; naming the target accepts that"]
        if not reasons and keep_experts and not target.stock and split.routed:
            reasons = [f"all its experts are always on; --target {target.name} writes the same function for any engine"]
            return Choice(TARGETS[OWN], {target.name: reasons})
        if not reasons:
            return Choice(target, refused)
        refused[target.name] = reasons
    if reasons := judge(TARGETS[OWN]):
        raise InputError(f"no target can hold this model: {'; '.join(reasons)}")
    return Choice(TARGETS[OWN], refused)


def _auto_order(split: Split) -> list[Target]:
    """``dense``, then the stock targets, those without a shared expert first where the split has none."""
    others = [target for target in TARGETS.values() if target.stock]
    if not any(shape.shared for shape in split.shapes.values()):
        others.sort(key=lambda target: not target.replicates)
    return [TARGETS["dense"], *others]


def _too_costly(split: Split) -> list[str]:
    """Reasons against copying the shared neurons into every expert."""
    for path, shape in split.shapes.items():
        active = shape.top_k * (shape.shared + shape.width)
        if shape.shared and active > shape.d_ff:
            return [
                f"it has no shared expert: with the shared neurons in each of the {shape.top_k} active experts, "
                f"{path} would compute {active} neurons per token, dense has {shape.d_ff}"
            ]
    return []
