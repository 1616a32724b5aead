"""Quality: perplexity over dense with its interval, beside controls and references, as rows of one scale.

The rows are HTML placed in percent, so that their words keep their size on every screen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.report.facts import DENSE, MODEL, Facts, protocol_words
from moesaic.report.html import element, escape, note, table
from moesaic.report.svg import percent

_NAMES = {
    MODEL: "this model",
    DENSE: "dense model",
    "static": "control: static pruning",
    "random": "control: random experts",
    "int8": "int8 weights, all neurons",
}
_REMARKS = {
    "static": "the neurons of largest mean energy, the same for every token",
    "random": "a random split with a random router",
    "int8": "what of the loss is rounding",
}


@dataclass(frozen=True)
class Mark:
    """One row of the scale: a ratio with its interval; ``style`` a class of the page."""

    name: str
    ratio: float
    low: float | None
    high: float | None
    style: str
    remark: str = ""

    @classmethod
    def of(cls, name: str, ratio: Mapping[str, Any], style: str, remark: str = "") -> Mark:
        """From an entry ``ratio_to_dense`` of results.json."""
        return cls(name, ratio["ratio"], ratio.get("low"), ratio.get("high"), style, remark)

    @property
    def shown(self) -> str:
        """``1.184 [1.165, 1.207]``."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.ratio:.3f}{interval}"


def label_name(label: str) -> str:
    """The words for a row's label in results.json."""
    return _NAMES.get(label, label)


def scale(marks: Sequence[Mark]) -> str:
    """Rows of dots with intervals on one logarithmic axis with 1, the dense model, marked; "" without rows."""
    if not marks:
        return ""
    low = min(1.0, *(mark.low or mark.ratio for mark in marks))
    high = max(1.02, *(mark.high or mark.ratio for mark in marks))
    span = math.log(high / low) * 1.04

    def place(value: float) -> str:
        return f"{100 * math.log(value / low) / span:.2f}%"

    rows = []
    for mark in marks:
        line = ""
        if mark.low is not None and mark.high is not None:
            length = f"{100 * math.log(mark.high / mark.low) / span:.2f}%"
            line = f'<i class="interval" style="left:{place(mark.low)};width:{length}"></i>'
        title = f"{mark.name}: {mark.shown} times the dense model's perplexity"
        rows.append(
            f'<div class="row {mark.style}" title="{escape(title)}"><span class="name">{escape(mark.name)}'
            f"{element('small', escape(mark.remark)) if mark.remark else ''}</span>"
            f'<span class="track"><i class="one" style="left:{place(1.0)}"></i>{line}'
            f'<i class="point" style="left:{place(mark.ratio)}"></i></span>'
            f'<span class="value">{escape(mark.shown)}</span></div>'
        )
    return f'<div class="scale">{"".join(rows)}</div>'


def quality(facts: Facts) -> list[str]:
    """A scale and a table per protocol."""
    parts = []
    for protocol, evaluation in facts.evaluations.items():
        rows = evaluation.get("perplexity", {})
        parts.append(f"<h3>{escape(protocol_words(protocol))}</h3>")
        parts.append(
            scale([_mark(label, row["ratio_to_dense"]) for label, row in rows.items() if "ratio_to_dense" in row])
        )
        headers = ["model", "perplexity", "over dense [95 %]", "neurons used"]
        parts.append(table(headers, [_row(label, row, evaluation) for label, row in rows.items()]))
    if not parts:
        return [note("Nothing has been measured yet. `moesaic eval OUT --baseline DENSE --controls` does it.")]
    if not any(part.startswith('<div class="scale"') for part in parts):
        parts.append(note("Without the dense model there is no ratio: add `--baseline DENSE` to `moesaic eval`."))
    return [
        note(
            "Perplexity over that of the dense model on the same windows: 1 is no loss, and the scale is logarithmic. "
            "Lines are 95 % intervals, paired over windows."
        ),
        *parts,
    ]


def _mark(label: str, ratio: Mapping[str, Any]) -> Mark:
    return Mark.of(label_name(label), ratio, "main" if label == MODEL else "other", _REMARKS.get(label, ""))


def _row(label: str, row: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    ratio = row.get("ratio_to_dense")
    used = row.get("active_ffn_fraction")
    if label == MODEL:
        used = evaluation.get("active_ffn_fraction")
    shown = Mark.of("", ratio, "").shown if ratio else ""
    return [label_name(label), f"{row['value']:.3f}", shown, "" if used is None else percent(round(used, 3))]
