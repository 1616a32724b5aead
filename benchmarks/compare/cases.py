"""What is compared with what: every method and control, and how each is told its active fraction. No torch here.

The fraction is that of all FFNs of the model. A recipe that leaves the first layers dense gives the others less, so
that the total is the same. What a method cannot express raises :class:`InexpressibleError`, and is listed with its
reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from moesaic.blueprint.layout import Layout
from moesaic.jobs.settings import ConvertSettings, method_config
from moesaic.methods.token_clusters.config import Config

UNITS = range(8, 49)
"""Units that a layout may have; the least that hit the fraction exactly are taken."""
BRANCHES = 8
WITHIN_MANY, WITHIN_FEW = Fraction(86, 100), Fraction(92, 100)
"""Part of a share above and below a half that a union is planned with, so that other text stays within the share.
Chosen by how much more C4 had used than planned (not by its perplexity): 14 % of SmolLM2's converted FFNs at 72 %, 8 %
at 44 %."""


class InexpressibleError(Exception):
    """A method has no settings for this fraction; the message says why."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the dense model: decoder layers, neurons of each FFN, and whether these have a gate."""

    layers: int
    d_ff: int
    gated: bool = True


@dataclass(frozen=True)
class Recipe:
    """One row of the comparison.

    Attributes:
        label: What the tables call it.
        method: moesaic's name of the method.
        options: The method's options at an active fraction of the layers it converts.
        router: Linear router fitted in place of the method's own, or None.
        leading: Leave the first layers dense.
    """

    label: str
    method: str
    options: Callable[[Fraction, Shape], dict[str, Any]]
    router: str | None = None
    leading: bool = False


@dataclass(frozen=True)
class Case:
    """A recipe at a fraction of the whole model's FFNs; ``settings`` are keys of moesaic's ConvertSettings.

    The dense model is the case without settings, at fraction 1.
    """

    name: str
    label: str
    fraction: Fraction
    settings: dict[str, Any] | None

    @property
    def key(self) -> str:
        """Its file's name."""
        return f"{self.name}@{percent(self.fraction)}"

    def options(self) -> dict[str, Any]:
        """All options of the method, defaults included; none for the dense model."""
        if self.settings is None:
            return {}
        return method_config(ConvertSettings.model_validate(self.settings)).model_dump(mode="json")


DENSE = Case("dense", "dense", Fraction(1), None)


def percent(fraction: Fraction) -> str:
    """``7/8`` -> ``87.5``."""
    return f"{float(100 * fraction):g}"


def _layout(share: Fraction, half_shared: bool) -> dict[str, Any]:
    units = next((units for units in UNITS if (share * units).denominator == 1), None)
    if units is None:
        raise InexpressibleError(f"no layout of at most {UNITS[-1]} units is {float(share):.2%} active")
    if half_shared:
        return {"layout": str(Layout.from_active_fraction(float(share), units))}
    return {"layout": f"S0A{int(share * units)}E{units}"}


def _half_shared(share: Fraction, _shape: Shape) -> dict[str, Any]:
    return _layout(share, half_shared=True)


def _routed(share: Fraction, _shape: Shape) -> dict[str, Any]:
    return _layout(share, half_shared=False)


def _narrow(share: Fraction, shape: Shape) -> dict[str, Any]:
    return _layout(share, half_shared=False) | {"expert_width": min(32, shape.d_ff)}


def _active(share: Fraction, _shape: Shape) -> dict[str, Any]:
    return {"active": float(share)}


def _refit(share: Fraction, shape: Shape) -> dict[str, Any]:
    return _active(share, shape) | {"experts": 1}


def _disjoint(share: Fraction, shape: Shape) -> dict[str, Any]:
    return _active(share, shape) | {"split": "disjoint"}


def _union(share: Fraction, shape: Shape) -> dict[str, Any]:
    return _active(share, shape) | {"split": "union"}


def _within(share: Fraction, shape: Shape) -> dict[str, Any]:
    """Planned lower, as experts of different widths are chosen otherwise on other text than that of the calibration."""
    return _union((WITHIN_MANY if share > Fraction(1, 2) else WITHIN_FEW) * share, shape)


def _equal(share: Fraction, shape: Shape) -> dict[str, Any]:
    return _union(share, shape) | {"widths": "equal"}


def _alike(share: Fraction, shape: Shape) -> dict[str, Any]:
    return _union(share, shape) | {"token_weight": "equal"}


def _refit_alike(share: Fraction, shape: Shape) -> dict[str, Any]:
    return _refit(share, shape) | {"token_weight": "equal"}


def _counted(share: Fraction, shape: Shape) -> dict[str, Any]:
    """The union with its router taken out of both budgets: E D numbers are what E / 3 neurons of a gated FFN have."""
    experts = len(Config(split="union").sizes(shape.d_ff).own)
    router = Fraction(experts, (3 if shape.gated else 2) * shape.d_ff)
    if share <= router:
        raise InexpressibleError(f"a router of {experts} experts alone is {float(router):.1%} of an FFN")
    return _union(share - router, shape) | {"max_params": float(1 - router)}


def _counted_equal(share: Fraction, shape: Shape) -> dict[str, Any]:
    return _counted(share, shape) | {"widths": "equal"}


def _kept_branches(share: Fraction, _shape: Shape) -> dict[str, Any]:
    keep = share * BRANCHES
    if keep.denominator != 1:
        raise InexpressibleError(f"{float(share):.2%} of {BRANCHES} branches is no whole number")
    return {"branches": BRANCHES, "keep": int(keep)}


def _oracle_branches(share: Fraction, shape: Shape) -> dict[str, Any]:
    return _kept_branches(share, shape) | {"prune_factor": "oracle"}


def _faded(share: Fraction, _shape: Shape) -> dict[str, Any]:
    """The linear schedule from 0 to s_max removes s_max / 2 in the mean."""
    fade_max = 2 * (1 - share)
    if fade_max >= 1:
        raise InexpressibleError(
            f"a linear schedule from 0 would need s_max = {float(fade_max):g}, which is not below 1"
        )
    return {"branches": BRANCHES, "order": "norm-sorted", "fade_max": float(fade_max), "fade_unit": "neuron"}


RECIPES: dict[str, Recipe] = {
    "clusters": Recipe("token clusters, overlapping", "token_clusters", _active),
    "clusters-lead": Recipe("token clusters, overlapping, first layers dense", "token_clusters", _active, leading=True),
    "union": Recipe("token clusters, stored once", "token_clusters", _union),
    "union-lead": Recipe("token clusters, stored once, first layers dense", "token_clusters", _union, leading=True),
    "alike-lead": Recipe(
        "token clusters, stored once, tokens counted alike, first layers dense", "token_clusters", _alike, leading=True
    ),
    "within-lead": Recipe(
        "token clusters, stored once, planned lower, first layers dense", "token_clusters", _within, leading=True
    ),
    "counted-lead": Recipe(
        "token clusters, stored once, router counted, first layers dense", "token_clusters", _counted, leading=True
    ),
    "equal": Recipe("token clusters, stored once, equal widths", "token_clusters", _equal),
    "equal-lead": Recipe(
        "token clusters, stored once, equal widths, first layers dense", "token_clusters", _equal, leading=True
    ),
    "counted-equal-lead": Recipe(
        "token clusters, stored once, equal widths, router counted, first layers dense",
        "token_clusters",
        _counted_equal,
        leading=True,
    ),
    "disjoint": Recipe("token clusters, disjoint", "token_clusters", _disjoint),
    "disjoint-lead": Recipe("token clusters, disjoint, first layers dense", "token_clusters", _disjoint, leading=True),
    "refit": Recipe("control: static, refitted", "token_clusters", _refit),
    "refit-lead": Recipe("control: static, refitted, first layers dense", "token_clusters", _refit, leading=True),
    "refit-alike-lead": Recipe(
        "control: static, refitted, tokens counted alike, first layers dense",
        "token_clusters",
        _refit_alike,
        leading=True,
    ),
    "static": Recipe("control: static pruning", "static", _active),
    "static-lead": Recipe("control: static pruning, first layers dense", "static", _active, leading=True),
    "random": Recipe("control: random partition", "random", _half_shared),
    "cmoe": Recipe("CMoE", "cmoe", _half_shared),
    "cmoe-oracle": Recipe("CMoE, linear router", "cmoe", _half_shared, router="oracle"),
    "cmoe-oracle-lead": Recipe("CMoE, linear router, first layers dense", "cmoe", _half_shared, "oracle", True),
    "moefication": Recipe("MoEfication", "moefication", _narrow),
    "moefication-oracle": Recipe("MoEfication, linear router", "moefication", _narrow, router="oracle"),
    "llama_moe": Recipe("LLaMA-MoE, untrained", "llama_moe", _routed),
    "llama_moe-oracle": Recipe("LLaMA-MoE, linear router", "llama_moe", _routed, router="oracle"),
    "mlpmoe-prune": Recipe("MLPMoE, Compensated Pruning", "mlpmoe", _kept_branches),
    "mlpmoe-prune-oracle": Recipe("MLPMoE, pruning, least-squares factor", "mlpmoe", _oracle_branches),
    "mlpmoe-fade": Recipe("MLPMoE, Fractal Fade of neurons", "mlpmoe", _faded),
}
"""The comparison's rows. The linear router is `--router oracle`, fitted on the same calibration tokens."""

LEFT_OUT: dict[str, str] = {
    "MLPMoE, Fractal Fade of weights": "zeros inside the matrices: every neuron stays active",
    "ToMoE": "trains on the whole model; benchmarks/tomoe.py",
    "Secret MoE": "trains every FFN; moesaic distill",
}
"""Methods that are not compared at any fraction, and why."""


def cases(
    shape: Shape, fractions: list[Fraction], leading: int, only: list[str] | None = None
) -> tuple[list[Case], dict[str, str]]:
    """All cases, the dense model first, fraction by fraction; and the reasons of those that cannot be had, by key.

    Args:
        shape: Of the dense model.
        fractions: Of the neurons of all its FFNs that one token uses.
        leading: Layers that ``leading`` recipes keep dense.
        only: Names of recipes; None is all.
    """
    found, reasons = [DENSE], {}
    for fraction in fractions:
        for name, recipe in RECIPES.items():
            if only is not None and name not in only:
                continue
            try:
                settings = settings_of(recipe, fraction, shape, leading)
            except InexpressibleError as reason:
                reasons[f"{name}@{percent(fraction)}"] = str(reason)
            else:
                found.append(Case(name, recipe.label, fraction, settings))
    return found, reasons


def settings_of(recipe: Recipe, fraction: Fraction, shape: Shape, leading: int) -> dict[str, Any]:
    """Keys of ConvertSettings. Raises InexpressibleError."""
    dense = leading if recipe.leading else 0
    if dense >= shape.layers:
        raise InexpressibleError(f"{dense} of {shape.layers} layers dense leave none to convert")
    share = (fraction * shape.layers - dense) / (shape.layers - dense)
    if share <= 0:
        raise InexpressibleError(f"{dense} dense layers of {shape.layers} are more than {percent(fraction)} % already")
    return {
        "method": recipe.method,
        "options": recipe.options(share, shape),
        "router": recipe.router,
        "dense_layers": tuple(range(dense)),
    }
