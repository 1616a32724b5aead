"""What is measured: conversions of a dense model, and points, each one of them in one engine and one type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from moesaic.methods.token_clusters.config import Config

LEADING = 3
"""First layers that the conversions of several experts leave dense; the rest are the narrower for it."""
ALIGN = 32
"""Widths of experts in stock architectures are multiples of this, which q8_0 needs."""
_NEAR = 0.02
"""How far the active neurons of copies may be from what was asked, of all of the FFN, to make experts wider."""
LLAMA_CPP, TRANSFORMERS = "llama.cpp", "transformers"
ENGINES = (LLAMA_CPP, TRANSFORMERS)
DENSE = "dense"
BASE = {LLAMA_CPP: "dense-f16", TRANSFORMERS: "dense-bf16"}
"""The dense model of each engine, to which all of its points are compared."""
_BF16 = "bf16"

Group = Literal["dense", "pruned", "stock", "own"]
GROUPS: dict[Group, str] = {
    "dense": "the dense model, quantised",
    "pruned": "static pruning, refitted: a narrower dense model",
    "stock": "experts in a stock architecture (glm4_moe)",
    "own": "the moesaic architecture",
}
Form = Literal["copies", "cmoe", "static", "neurons", "union"]


@dataclass(frozen=True)
class Conversion:
    """How a folder is made. ``active``: share of all FFN neurons that a token uses."""

    form: Form
    active: Fraction

    @property
    def key(self) -> str:
        """Such as ``copies-75``."""
        return f"{self.form}-{round(100 * self.active)}"

    @property
    def label(self) -> str:
        """For people."""
        names = {
            "copies": "token clusters, copies",
            "cmoe": "CMoE S3A3E8" if self.active == Fraction(3, 4) else "CMoE S2A2E8",
            "static": "static pruning, refitted",
            "neurons": "neuron experts",
            "union": "token clusters, stored once",
        }
        return f"{names[self.form]}, {round(100 * self.active)} %"

    @property
    def group(self) -> Group:
        """What it stands beside."""
        return {"static": "pruned", "copies": "stock", "cmoe": "stock"}.get(self.form, "own")  # pyright: ignore[reportReturnType]

    def converted(self, layers: int) -> int:
        """How many of so many layers are not left dense."""
        return layers - LEADING if self.form in ("copies", "union") else layers

    def used(self, layers: int, d_ff: int) -> float:
        """Share of all FFN neurons that a token uses, dense layers among them; planned, where experts differ."""
        if self.form != "copies":
            return float(self.active)
        return (copied_neurons(self._in_rest(layers), d_ff) / d_ff * (layers - LEADING) + LEADING) / layers

    def _in_rest(self, layers: int) -> Fraction:
        return (self.active * layers - LEADING) / (layers - LEADING)

    def arguments(self, layers: int, d_ff: int) -> list[str]:
        """Of ``moesaic convert``, beside the two folders, for a model of so many layers and neurons per FFN."""
        in_rest = self._in_rest(layers)
        match self.form:
            case "copies":
                share = repr(copied_neurons(in_rest, d_ff) / d_ff)
                stock = ["--align", str(ALIGN), "--target", "glm4_moe"]
                return ["--preset", "token-clusters-copies", "--active", share, *stock]
            case "union":
                return ["--preset", "token-clusters", "--active", repr(float(in_rest))]
            case "cmoe":
                units = round(4 * self.active)  # of eight, half of them shared
                return ["--preset", "cmoe-linear", "--layout", f"S{units}A{units}E8", "--target", "glm4_moe"]
            case "neurons":
                return ["--preset", "neuron-experts", "--active", repr(float(self.active))]
            case "static":
                text = ["--calib", "wikitext", "--calib", "wiki", "--calib-tokens", "16384", "--calib-window", "2048"]
                one = ["--method", "token_clusters", "--set", "experts=1", "--active", repr(float(self.active))]
                return [*one, *text, "--target", "dense"]


def copied_neurons(active: Fraction, d_ff: int) -> int:
    """Of the counts near ``active`` that ``ALIGN`` divides, the one whose experts are widest; the nearest of several.

    Narrow experts have little that the others lack, and what is shared is a whole number of them.
    """
    wanted = active * d_ff
    counts = [count for count in range(ALIGN, d_ff, ALIGN) if abs(count - wanted) <= _NEAR * d_ff]
    if not counts:
        return max(ALIGN, round(wanted / ALIGN) * ALIGN)

    def merit(count: int) -> tuple[int, Fraction]:
        return Config(active=count / d_ff, align=ALIGN).sizes(d_ff).own[0], -abs(count - wanted)

    return max(counts, key=merit)


@dataclass(frozen=True)
class Point:
    """A model in an engine: ``model`` is ``dense`` or the key of a conversion, ``dtype`` a type of GGUF, or bf16."""

    model: str
    dtype: str

    @property
    def key(self) -> str:
        """Such as ``copies-75-q8_0``."""
        return f"{self.model}-{self.dtype}"

    @property
    def engine(self) -> str:
        """What runs it."""
        return TRANSFORMERS if self.dtype == _BF16 else LLAMA_CPP

    @property
    def label(self) -> str:
        """For people."""
        return f"{CONVERSIONS[self.model].label if self.model in CONVERSIONS else self.model}, {self.dtype}"

    @property
    def group(self) -> Group:
        """What it stands beside."""
        return CONVERSIONS[self.model].group if self.model in CONVERSIONS else "dense"


_THREE_QUARTERS, _HALF, _QUARTER = Fraction(3, 4), Fraction(1, 2), Fraction(1, 4)
_STOCK = [Conversion(form, active) for form in ("static", "copies", "cmoe") for active in (_THREE_QUARTERS, _HALF)]
_OWN = [Conversion("neurons", _HALF), Conversion("neurons", _QUARTER)]
_OWN += [Conversion("union", _THREE_QUARTERS), Conversion("union", _HALF)]
CONVERSIONS: dict[str, Conversion] = {one.key: one for one in (*_STOCK, *_OWN)}

POINTS: dict[str, Point] = {
    point.key: point
    for point in (
        *(Point(DENSE, dtype) for dtype in ("f16", "q8_0", "q6_k", "q4_k_m", "q4_0", "q3_k_m", "q2_k")),
        *(Point(one.key, dtype) for one in _STOCK for dtype in ("q8_0", "q4_k_m")),
        Point("copies-50", "f16"),
        Point(DENSE, _BF16),
        *(Point(one.key, _BF16) for one in _OWN),
    )
}
"""In the order of the tables."""


def is_conversion(point: Point) -> bool:
    """Whether it has experts: neither the dense model nor a narrower one."""
    return point.group in ("stock", "own")


def chosen(keys: Sequence[str] | None) -> list[Point]:
    """The points of these keys in the order of ``POINTS``; None is all. The dense ones to compare to are added."""
    points = [point for key, point in POINTS.items() if keys is None or key in keys]
    bases = {BASE[point.engine] for point in points}
    return [point for key, point in POINTS.items() if point in points or key in bases]
