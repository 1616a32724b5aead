"""Several outputs beside each other: one table, one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.report.cost import used_shares
from moesaic.report.facts import DENSE, MODEL, Facts, protocol_words, shared_protocols
from moesaic.report.html import escape, note, table
from moesaic.report.layers import Series, figure, layer_lines
from moesaic.report.page import document
from moesaic.report.quality import Mark, label_name, scale
from moesaic.report.svg import Chart, nice_ticks, percent

_ALWAYS = ("layout", "active")
_STYLES = ("s0", "s1", "s2", "s3", "s4", "s5")
Paired = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Protocol -> name of a model -> its perplexity over the first one's, with low and high."""


def names_of(models: Sequence[Facts]) -> list[str]:
    """A name for each, numbered where folders have the same."""
    names = [facts.name for facts in models]
    return [f"{name} ({place + 1})" if names.count(name) > 1 else name for place, name in enumerate(names)]


def comparison_rows(models: Sequence[Facts], paired: Paired | None = None) -> list[list[str]]:
    """One line per fact: its name, then each model's value; "" where it is not known. Facts of none are left out."""
    rows = [
        ["dense model", *(facts.base for facts in models)],
        ["method", *(str(facts.made["method"]) for facts in models)],
        *_option_rows(models),
        ["architecture", *(str(facts.made.get("target") or facts.config.get("model_type")) for facts in models)],
        ["FFNs converted", *(_converted(facts) for facts in models)],
        ["neurons per token, planned", *_shown(models, lambda facts: facts.planned, percent)],
        ["neurons per token, measured", *_shown(models, _measured_share, percent)],
        ["FFN bytes per token over dense", *_shown(models, lambda facts: facts.relative_bytes, "{:.3f}".format)],
        ["parameters, millions", *(f"{facts.parameters / 1e6:.1f}" for facts in models)],
        ["generating, over dense", *_shown(models, lambda facts: _speedup(facts, "decode"), "{:.2f}".format)],
        ["reading a prompt, over dense", *_shown(models, lambda facts: _speedup(facts, "prefill"), "{:.2f}".format)],
        ["router: the oracle's experts", *_shown(models, lambda facts: _summary(facts, "overlap"), percent)],
        ["dead experts", *_shown(models, lambda facts: _summary(facts, "dead_experts"), "{:.0f}".format)],
    ]
    for protocol in dict.fromkeys(name for facts in models for name in facts.evaluations):
        rows += _quality_rows(models, protocol, (paired or {}).get(protocol, {}))
    return [row for row in rows if any(row[1:])]


def _option_rows(models: Sequence[Facts]) -> list[list[str]]:
    """Options that differ; of those that only one method knows, the size alone."""
    options = [facts.made.get("config", {}) for facts in models]
    names = [name for name in dict.fromkeys(key for each in options for key in each) if name != "allocation"]

    def shown(value: Any) -> str:
        return "" if value is None else str(value)

    rows = [[name, *(shown(each.get(name)) for each in options)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1 and (row[0] in _ALWAYS or len([v for v in row[1:] if v]) > 1)]


def _shown(models: Sequence[Facts], value: Any, show: Any) -> list[str]:
    found = [value(facts) for facts in models]
    return ["" if each is None else show(each) for each in found]


def _converted(facts: Facts) -> str:
    return f"{len(facts.converted)} of {len(facts.layers)}" if facts.layers else ""


def _ratio(row: Mapping[str, Any] | None) -> str:
    return Mark.of("", row["ratio_to_dense"], "").shown if row and row.get("ratio_to_dense") else ""


def _measured_share(facts: Facts) -> float | None:
    found = [each["active_ffn_fraction"] for each in facts.evaluations.values() if "active_ffn_fraction" in each]
    return found[-1] if found else None


def _speedup(facts: Facts, kind: str) -> float | None:
    speed = facts.speed()
    return speed[MODEL][kind] / speed[DENSE][kind] if speed else None


def _summary(facts: Facts, key: str) -> float | None:
    return facts.fidelity().get("summary", {}).get(key)


def _quality_rows(models: Sequence[Facts], protocol: str, paired: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    found = [facts.evaluations.get(protocol, {}).get("perplexity", {}).get(MODEL) for facts in models]
    rows = [
        [f"perplexity, {protocol_words(protocol)}", *("" if row is None else f"{row['value']:.3f}" for row in found)],
        [
            f"over dense [95 %], {protocol_words(protocol)}",
            *(_ratio(row) for row in found),
        ],
    ]
    if paired:
        rows.append(
            [
                f"over {names_of(models)[0]} [95 %], {protocol_words(protocol)}",
                *(Mark.of("", paired[name], "").shown if name in paired else "" for name in names_of(models)),
            ]
        )
    return rows


def comparison(models: Sequence[Facts], paired: Paired | None = None) -> str:
    """The page of several outputs."""
    names = names_of(models)
    return document(
        " against ".join(names) if len(names) < 4 else f"{len(names)} conversions",
        f"{len(names)} conversions of {', '.join(dict.fromkeys(facts.base for facts in models))}.",
        [],
        [
            ("table", "Side by side", [table(["", *names], comparison_rows(models, paired))]),
            ("quality", "Quality", _quality(models, names)),
            ("map", "Quality against cost", _map(models, names)),
            ("layers", "Layer by layer", _layers(models, names)),
        ],
    )


def _quality(models: Sequence[Facts], names: Sequence[str]) -> list[str]:
    parts = []
    for protocol in shared_protocols(models):
        marks, controls = [], {}
        for facts, name in zip(models, names, strict=True):
            for label, row in facts.evaluations[protocol]["perplexity"].items():
                if ratio := row.get("ratio_to_dense"):
                    if label == MODEL:
                        marks.append(Mark.of(name, ratio, "main"))
                    else:
                        controls[f"{label_name(label)}, at the share of {name}"] = ratio
        marks += [Mark.of(name, ratio, "other") for name, ratio in controls.items()]
        if marks:
            parts += [f"<h3>{escape(protocol_words(protocol))}</h3>", scale(marks)]
    if not parts:
        return [note("No text was read by all of them beside the dense model: measure them under one protocol.")]
    return [
        note("Perplexity over the dense model's: 1 is no loss. The scale is logarithmic. Lines are 95 % intervals."),
        *parts,
    ]


def _map(models: Sequence[Facts], names: Sequence[str]) -> list[str]:
    """Perplexity over dense against FFN bytes per token, a chart per shared protocol."""
    charts = []
    for protocol in shared_protocols(models):
        points = []
        for facts, name in zip(models, names, strict=True):
            ratio = facts.evaluations[protocol]["perplexity"].get(MODEL, {}).get("ratio_to_dense")
            if ratio and facts.relative_bytes is not None:
                points.append((facts.relative_bytes, float(ratio["ratio"]), name))
        if len(points) < 2:
            continue
        ends = nice_ticks(min(1.0, *(y for _, y, _ in points)), max(y for _, y, _ in points) * 1.01)
        high = max(1.05, math.ceil(max(x for x, _, _ in points) * 20) / 20)
        chart = Chart(
            "Quality against cost", (0.0, high), (ends[0], ends[-1]), "{:.4g}".format, "FFN bytes per token over dense"
        )
        chart.level(1.0, "dense")
        for place, (x, y, name) in enumerate(points):
            chart.dot(
                x, y, _STYLES[place % len(_STYLES)], f"{name}: {x:.3f} of the bytes, {y:.3f} times the perplexity", 5
            )
            chart.text(x, y, name, 9)
        charts.append(figure(protocol_words(protocol), chart.svg([0, 0.25, 0.5, 0.75, 1.0])))
    return (
        [note("Below and to the left is better."), f'<div class="charts wide">{"".join(charts)}</div>']
        if charts
        else []
    )


def _layers(models: Sequence[Facts], names: Sequence[str]) -> list[str]:
    def series(values: Any) -> list[Series]:
        return [
            (name, _STYLES[place % len(_STYLES)], facts.by_layer(values(facts)))
            for place, (facts, name) in enumerate(zip(models, names, strict=True))
        ]

    def shares(facts: Facts) -> dict[str, float]:
        return {layer.path: layer.share for layer in facts.layers} | used_shares(facts)

    def errors(facts: Facts) -> dict[str, float]:
        sites = facts.sample.get("sites", {})
        return {path: site["error"] for path, site in sites.items() if site.get("error") is not None}

    def overlap(facts: Facts) -> dict[str, float]:
        return {site["site"]: site["overlap"] for site in facts.fidelity().get("sites", ()) if site["tokens"]}

    charts = [
        layer_lines("Neurons that a token uses", "", series(shares), top=1.0),
        layer_lines("Error of the FFN's output", "On the sample text of each report.", series(errors)),
        layer_lines("Router: the right experts", "Share that is the oracle's.", series(overlap), top=1.0),
    ]
    grid = "".join(chart for chart in charts if chart)
    return [f'<div class="charts">{grid}</div>'] if grid else []
