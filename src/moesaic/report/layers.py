"""Layer by layer: neurons used, error against the dense FFN, router fidelity, loads and dead experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moesaic.report.cost import used_shares
from moesaic.report.facts import Facts, Layer
from moesaic.report.html import element, escape, note, table
from moesaic.report.svg import MOST_COLUMNS, Point, heat_map, layer_chart, layer_ticks, nice_ticks, percent

Series = tuple[str, str, Sequence[Point]]
"""Name, class, points (layer, value)."""
_MOST_ROWS = 200


def layer_lines(
    title: str, remark: str, series: Sequence[Series], show: Callable[[float], str] = percent, top: float | None = None
) -> str:
    """A figure with one line per series over the layers; "" where there are no points."""
    series = [one for one in series if one[2]]
    if not series:
        return ""
    layers = sorted({int(x) for _, _, points in series for x, _ in points})
    highest = max(y for _, _, points in series for _, y in points)
    ends = nice_ticks(0, highest * 1.02 or 1.0)
    chart = layer_chart(title, layers, (0, ends[-1] if top is None or highest < top / 2 else top), show)
    for name, style, points in series:
        chart.line(points, style, name=name)
    legend = ""
    if len(series) > 1:
        legend = "".join(f'<span class="key {style}">{escape(name)}</span>' for name, style, _ in series)
        legend = f'<div class="legend">{legend}</div>'
    return figure(title, chart.svg(layer_ticks(layers)), legend, remark)


def figure(title: str, picture: str, legend: str = "", remark: str = "") -> str:
    """A picture with its name above and what it means below."""
    small = element("p", escape(remark), class_="note") if remark else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{picture}{small}</figure>"


def layers(facts: Facts) -> list[str]:
    """Charts over the layers, the loads, and all of it as a table."""
    if not facts.layers:
        return [note("The blueprint no longer holds: this folder was trained after its conversion.")]
    fidelity = {site["site"]: site for site in facts.fidelity().get("sites", ())}
    charts = [_active(facts), _error(facts), *_routing(facts, fidelity), _allocation(facts)]
    grid = "".join(chart for chart in charts if chart)
    return [f'<div class="charts">{grid}</div>', _loads(facts, fidelity), _all_rows(facts, fidelity)]


def _active(facts: Facts) -> str:
    planned = facts.by_layer({layer.path: layer.share for layer in facts.layers})
    used = used_shares(facts)
    dense = {layer.path: 1.0 for layer in facts.layers if not layer.converted}
    series: list[Series] = [("planned", "muted" if facts.varies else "main", planned)]
    if facts.varies:
        series.append(("on the sample text", "main", facts.by_layer(dense | used)))
    return layer_lines("Neurons that a token uses", "A layer at 100 % is dense.", series, top=1.0)


def _error(facts: Facts) -> str:
    errors = {
        path: site["error"] for path, site in facts.sample.get("sites", {}).items() if site.get("error") is not None
    }
    remark = "|y - dense|² over |dense|², the mean over the sample's tokens, on what the layer reads in this model."
    return layer_lines("Error of the FFN's output", remark, [("error", "main", facts.by_layer(errors))])


def _routing(facts: Facts, fidelity: Mapping[str, Mapping[str, Any]]) -> list[str]:
    def points(key: str) -> list[Point]:
        return facts.by_layer({path: site[key] for path, site in fidelity.items() if site["tokens"]})

    overlap: list[Series] = [("router", "main", points("overlap")), ("chance", "muted", points("chance"))]
    energy: list[Series] = [
        ("router", "main", points("energy_router")),
        ("oracle", "second", points("energy_oracle")),
    ]
    return [
        layer_lines(
            "Router: the right experts", "Share of the chosen experts that are the oracle's.", overlap, top=1.0
        ),
        layer_lines(
            "Router: energy kept", "Share of the experts' output energy that the choice keeps.", energy, top=1.0
        ),
    ]


def _allocation(facts: Facts) -> str:
    """What each layer loses alone, where the sparsity was shared out by that."""
    found: Mapping[str, Sequence[float]] = facts.results.get("allocation", {}).get("kl", {})
    styles = ("main", "second", "third", "muted")
    series: list[Series] = [
        (f"at {percent(float(share))}", style, [(float(layer), value) for layer, value in enumerate(values)])
        for (share, values), style in zip(sorted(found.items(), reverse=True), styles, strict=False)
    ]
    return layer_lines("Loss of each layer alone", "Nats per token, before the conversion.", series, "{:.3g}".format)


def _loads(facts: Facts, fidelity: Mapping[str, Mapping[str, Any]]) -> str:
    """A heat map where each decoder layer has one FFN."""
    places = [layer.index for layer in facts.converted]
    if len(set(places)) < len(places):
        return ""
    rows = [
        (str(layer.index), fidelity[layer.path]["load"])
        for layer in facts.converted
        if fidelity.get(layer.path, {}).get("load")
    ]
    if not rows:
        return ""
    even = [1 / len(values) for _, values in rows]
    many = max(len(values) for _, values in rows) > MOST_COLUMNS
    order = "Each row is sorted by load." if many else "One row per layer, one column per expert."
    dead = sum(site["dead"] for site in fidelity.values())
    read = max(site["tokens"] for site in fidelity.values())
    shown = f"{dead} of {sum(len(values) for _, values in rows)} experts were chosen by none of {read:,} tokens."
    picture = f'<div class="scroll" tabindex="0">{heat_map(rows, even, "Load of every expert")}</div>'
    return figure(
        "Load of every expert",
        picture,
        "",
        f"{order} The strongest cells have three times an even share of the choices, or more. {shown}",
    )


_HEADERS = ("FFN", "neurons", "shared", "experts", "width", "top-k", "planned", "sample", "error", "oracle's", "dead")


def _all_rows(facts: Facts, fidelity: Mapping[str, Mapping[str, Any]]) -> str:
    sample = facts.sample.get("sites", {})
    rows = [
        _row(layer, sample.get(layer.path, {}), fidelity.get(layer.path, {})) for layer in facts.layers[:_MOST_ROWS]
    ]
    left = len(facts.layers) - len(rows)
    more = note(f"{left} more are in `moesaic inspect`.") if left > 0 else ""
    return f"<details><summary>All layers as a table</summary>{table(_HEADERS, rows)}{more}</details>"


def _row(layer: Layer, site: Mapping[str, Any], routed: Mapping[str, Any]) -> list[str]:
    """One FFN under ``_HEADERS``."""
    if not layer.converted:
        return [layer.path, f"{layer.d_ff:,}", "dense", *[""] * 8]
    error = site.get("error")
    return [
        layer.path,
        f"{layer.d_ff:,}",
        f"{layer.shared:,}",
        f"{layer.experts:,}",
        layer.width,
        f"{layer.top_k:,}",
        percent(layer.share),
        percent(site["share"]) if site else "",
        "" if error is None else percent(error),
        percent(routed["overlap"]) if routed else "",
        f"{routed['dead']:,}" if routed else "",
    ]
