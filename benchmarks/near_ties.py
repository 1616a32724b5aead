"""Is a routed conversion in bf16 as good as in fp32? The same experts chosen by the same routers, on the same windows.

A router that scores two experts nearly alike chooses another one where its input is rounded. So each window is computed
four times: as fp32; as bf16; as bf16 with the experts that fp32 chose; and as fp32 whose routers read their inputs
rounded to bf16. What the choices do and what the rounding of weights and activations does come apart.

Axes: N windows, W tokens per window, D model width, K chosen experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.anatomy import read_anatomy
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.reader import Checkpoint
from moesaic.evaluate.comparison import Comparison, compare
from moesaic.evaluate.perplexity import Perplexity, perplexity
from moesaic.materialise.apply import apply_blueprint
from moesaic.nn.modeling_moesaic import MoEFeedForward

Choice = tuple[Tensor, Tensor | None]
"""Chosen experts idx_WK of one FFN, and their weights (None: all 1)."""

Windows = dict[str, Any]
"""A line of the log: ``windows``, what :meth:`Ties.window` found of each; ``predicted``, tokens of one."""


class Choices:
    """What the routers of a model choose; ``forced`` is computed with in its place. ``made`` is of the last window."""

    def __init__(self, model: nn.Module) -> None:
        self.made: list[Choice] = []
        self.forced: list[Choice] | None = None
        for module in model.modules():
            if isinstance(module, MoEFeedForward) and module.experts and not module.static:
                module._route = self._watched(module._route)

    def _watched(self, route: Callable[[Tensor], Choice]) -> Any:
        def chosen(x_WD: Tensor) -> Choice:
            self.made.append(route(x_WD))
            return self.made[-1] if self.forced is None else self.forced[len(self.made) - 1]

        return chosen


class Converted:
    """A dense folder with a blueprint applied in memory, in the folder's own dtype; without one, the dense model."""

    def __init__(self, folder: Path, blueprint: Blueprint | None) -> None:
        moesaic.register()
        checkpoint = Checkpoint(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        if blueprint is not None:
            apply_blueprint(self.model, blueprint, read_anatomy(checkpoint.config), checkpoint)
        self.choices = Choices(self.model)

    def nll(self, ids_W: Tensor, forced: list[Choice] | None = None) -> tuple[float, list[Choice]]:
        """Summed negative log-likelihood of one window, and what the routers chose (or would have)."""
        self.choices.made, self.choices.forced = [], forced
        found = perplexity(self._logits, ids_W[None], "")
        return found.window_nll[0], self.choices.made

    def _logits(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.model(input_ids=input_ids, use_cache=use_cache).logits)


@contextmanager
def rounded_inputs(model: nn.Module) -> Iterator[None]:
    """Within the block, every router of ``model`` reads its input rounded to bf16."""
    handles = [
        module.router.register_forward_pre_hook(lambda _, args: (args[0].bfloat16().float(), *args[1:]))
        for module in model.modules()
        if isinstance(module, MoEFeedForward) and module.router is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Ties:
    """One conversion in both dtypes; of the dense model, where ``blueprint`` is None, the variants are two."""

    def __init__(self, folders: dict[str, Path], blueprint: Blueprint | None) -> None:
        self.routed = blueprint is not None
        self.single = Converted(folders["float32"], blueprint)
        self.half = Converted(folders["bfloat16"], blueprint)

    def window(self, ids_W: Tensor) -> dict[str, float]:
        """Summed negative log-likelihood by variant; and under ``rechosen``, ``rechosen by inputs``, the shares of the
        tokens of all FFNs for which bf16, and fp32 whose routers read bf16, choose other experts than fp32."""
        found: dict[str, float] = {}
        found["fp32"], of_single = self.single.nll(ids_W)
        found["bf16"], of_half = self.half.nll(ids_W)
        if not self.routed:
            return found
        with rounded_inputs(self.single.model):
            found["rounded"], of_rounded = self.single.nll(ids_W)
        found["bf16 forced"] = self.half.nll(ids_W, of_single)[0]
        shares = {"rechosen": _rechosen(of_single, of_half), "rechosen by inputs": _rechosen(of_single, of_rounded)}
        return found | shares


def _rechosen(first: list[Choice], second: list[Choice]) -> float:
    """Share of the tokens of all FFNs that have another set of experts."""
    marks = [
        (a_WK.sort(1).values != b_WK.sort(1).values).any(1).float()
        for (a_WK, _), (b_WK, _) in zip(first, second, strict=True)
    ]
    return torch.cat(marks).mean().item()


def over_dense(model: Perplexity, dense: Perplexity) -> Perplexity:
    """What ``compare`` takes to set two ratios to dense side by side: log-likelihoods less those of the dense model."""
    both = zip(model.window_nll, dense.window_nll, strict=True)
    nll = tuple(own - its for own, its in both)
    return Perplexity(model.name, math.exp(sum(nll) / model.predicted), model.predicted, nll)


def difference(case: Windows, dense: Windows, variant: str) -> Comparison:
    """Perplexity over dense of ``variant`` over that of fp32, paired over the windows that both have."""
    count = min(len(case["windows"]), len(dense["windows"]))

    def of(line: Windows, name: str) -> Perplexity:
        nll = tuple(window[name] for window in line["windows"][:count])
        return Perplexity("", 0.0, count * case["predicted"], nll)

    whole = "bf16" if variant.startswith("bf16") else "fp32"
    single = over_dense(of(case, "fp32"), of(dense, "fp32"))
    return compare(over_dense(of(case, variant), of(dense, whole)), single)


def table(cases: dict[str, Windows], dense: Windows) -> list[str]:
    """Lines of Markdown: one row per case."""
    rows = [
        "| method | windows | other experts | bf16 to fp32 | bf16 with the experts of fp32, to fp32 "
        "| fp32 whose routers read bf16, to fp32 |",
        "|---|---|---|---|---|---|",
    ]
    variants = ("bf16", "bf16 forced", "rounded")
    for case_name, case in cases.items():
        shares = [window["rechosen"] for window in case["windows"]]
        cells = [case_name, str(len(shares)), f"{sum(shares) / len(shares):.1%}"]
        rows.append("| " + " | ".join([*cells, *(percent(difference(case, dense, name)) for name in variants)]) + " |")
    return rows


def verdict(cases: dict[str, Windows], dense: Windows, bound: float) -> str:
    """What the table comes to: how far from fp32 figures and intervals are; ``bound``: what counts as equal."""

    def reach(variant: str) -> tuple[float, float]:
        found = [difference(case, dense, variant) for case in cases.values()]
        ends = [end for each in found for end in (each.low, each.high) if end is not None]
        return max(abs(each.ratio - 1) for each in found), max((abs(end - 1) for end in ends), default=math.inf)

    (_, forced), (mean, free), (_, rounded) = map(reach, ("bf16 forced", "bf16", "rounded"))
    equal = f"at most {bound:.1%}: equal" if forced <= bound else f"more than {bound:.1%}"
    return (
        f"With the experts that fp32 chose, all intervals lie within {forced:.2%} of fp32, {equal}. "
        f"As bf16 chooses, figures differ by up to {mean:.2%} and their intervals reach {free:.2%}. "
        f"Those of fp32 whose routers read bf16 reach {rounded:.2%}, though nothing else is rounded there."
    )


def percent(found: Comparison, interval: bool = True) -> str:
    """A ratio as its distance from 1, such as ``-1.47% [-2.10, -0.80]``, or without its interval."""
    if found.low is None or found.high is None or not interval:
        return f"{found.ratio - 1:+.2%}"
    low, high = (f"{100 * (bound - 1):+.2f}" for bound in (found.low, found.high))
    return f"{found.ratio - 1:+.2%} [{low}, {high}]"
