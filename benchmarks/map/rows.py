"""The rows of the map, in the order in which they are measured: cheap and decisive ones first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.map.references import Cats, LowBit, Nested, Product, Reference, Scored, Staged, Teal, WeightOnly

Group = Literal["dense", "bound", "weights", "grid", "activations", "ours", "variant"]
GROUPS: dict[Group, str] = {
    "dense": "dense",
    "bound": "the best that any choice of neurons could do; no one can build it",
    "weights": "weight-only quantisation, all neurons",
    "grid": "weights on the grid that the dense model's lie on already; these are the dense model",
    "activations": "thresholds on activations",
    "ours": "neuron experts, and older methods of ours",
    "variant": "variants that were tried",
}


@dataclass(frozen=True)
class Row:
    """One setting of one reference. ``base``: the row that it changes one thing of."""

    key: str
    label: str
    group: Group
    reference: Reference
    base: str | None = None


def _at(
    percents: str, name: str, label: str, group: Group, reference: Scored | Teal, base: str | None = None
) -> list[Row]:
    """A row of ``reference`` for each percentage; ``base`` is without one."""
    return [
        Row(
            f"{name}@{percent}",
            f"{label}, {percent} %",
            group,
            replace(reference, active=int(percent) / 100),
            None if base is None else f"{base}@{percent}",
        )
        for percent in percents.split()
    ]


def _four(group: int, squares: bool = False) -> Row:
    better, label = ("-squares", ", least squares") if squares else ("", "")
    return Row(
        f"q4-g{group}{better}", f"4-bit weights, groups of {group}{label}", "weights", WeightOnly(4, group, squares)
    )


_INT8 = WeightOnly(8, 64)
_TWO = LowBit(bits=2)
_NESTED = "neuron experts nested in int8"

ROWS: tuple[Row, ...] = (
    Row("dense", "dense in bf16", "dense", Reference()),
    Row("int8", "int8 weights, groups of 64", "weights", _INT8),
    _four(64),
    *_at("50", "low4", "neuron experts, 4 bits", "ours", LowBit()),
    *_at("50", "nested", _NESTED, "ours", Nested()),
    *_at("50", "teal", "TEAL", "activations", Teal()),
    *_at("50 25", "oracle", "oracle", "bound", Scored()),
    *_at("25", "low4", "neuron experts, 4 bits", "ours", LowBit()),
    *_at("25 35", "nested", _NESTED, "ours", Nested()),
    *_at("75", "teal", "TEAL", "activations", Teal()),
    *_at("75 50", "teal-int8", "TEAL on int8 weights", "activations", Teal(rounding=_INT8)),
    _four(64, squares=True),
    _four(32),
    _four(128),
    *_at("50 25", "low3", "neuron experts, 3 bits", "ours", LowBit(bits=3)),
    *_at("75", "cats", "CATS", "activations", Cats()),
    *_at("35 25", "nested-threshold", f"{_NESTED}, threshold", "ours", Nested(choice="threshold"), "nested"),
    *_at("50 25", "product4", "neuron experts of moesaic, 4 bits", "ours", Product(), "low4"),
    *_at("75 33", "low4", "neuron experts, 4 bits", "ours", LowBit()),
    *_at("50 25", "low4-threshold", "neuron experts, 4 bits, threshold", "ours", LowBit(choice="threshold"), "low4"),
    *_at("35 25", "nested-refit", f"{_NESTED}, refitted", "ours", Nested(refit=True), "nested"),
    *_at("25", "low3-refit", "neuron experts, 3 bits, refitted", "ours", LowBit(bits=3, refit=True), "low3"),
    *_at("50", "cats", "CATS", "activations", Cats()),
    *_at("50", "low2", "neuron experts, 2 bits", "ours", _TWO),
    *_at("50", "low2-squares", "2 bits, least squares of weights", "variant", replace(_TWO, grid="squares"), "low2"),
    *_at("50", "low2-inputs", "2 bits, least squares of products", "variant", replace(_TWO, grid="inputs"), "low2"),
    *_at(
        "50 25",
        "low4-shared",
        "4 bits, one threshold for all layers",
        "variant",
        LowBit(choice="shared"),
        "low4-threshold",
    ),
    *_at(
        "25",
        "nested-both",
        f"{_NESTED}, threshold and refit",
        "ours",
        Nested(choice="threshold", refit=True),
        "nested-refit",
    ),
    *_at("25", "low2", "neuron experts, 2 bits", "ours", _TWO),
    *_at("25", "staged", "4 bits of candidates of rank 32", "variant", Staged(), "low4"),
    *_at("25", "staged64", "4 bits of candidates of rank 64", "variant", Staged(rank=64), "low4"),
    *_at("50", "staged", "4 bits of candidates of rank 32", "variant", Staged(candidates=0.75), "low4"),
)
BY_KEY: dict[str, Row] = {row.key: row for row in ROWS}
