"""The page: plots, what they say, all figures, and what size it would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.payoff.cost import LARGER, overhead, weights_of
from benchmarks.payoff.decide import guide
from benchmarks.payoff.measured import Found, Kind, Regime, clear, complete, found_in, front
from benchmarks.payoff.plot import draw
from benchmarks.payoff.points import CONVERSIONS, DENSE, ENGINES, Point, is_conversion
from benchmarks.payoff.prepare import Place
from benchmarks.rows import write_rows

from moesaic.durable import replace_text

KINDS: tuple[Kind, ...] = ("decode", "prefill")
PLOTTED = {kind: Regime(kind, 1, 1) for kind in KINDS}
"""Regimes of the plots."""

INTRO = """# When does it pay?

`python -m benchmarks.payoff prepare|quality|speed|page WORK NAME=MODEL ... --report docs/results/payoff`

A converted model beside what is easier: the dense model in fewer bits, or pruned.
[Does it pay for me?](../howto/payoff.md) draws the conclusions.

* **Perplexity** is of WikiText-2 (test), in the engine that serves the file. Ratios are to the dense model of the same
  engine: f16 in llama.cpp, bf16 in transformers. They are paired over windows and have their 95 % interval.
* **Speed** is tokens per second, and its ratio to that same dense model: the median over the rounds, the least and the
  largest. Prompts have 256 tokens, or 8 times 16. Only the last token of a prompt goes through the head.
* **MB** are those of the file, or of the weights in the folder. **Held** is what the process holds more after decoding
  than before loading. Pages of a mapped file count once they were read.
* **Static pruning** is refitted and has equal widths in all layers. Copies leave the first three layers dense and have
  widths that 32 divides. Nothing is tuned. The end of the page has the commands.
* **Neuron experts** compute prompts by the dense FFN. So their prompts are as good as the dense model's, and their
  perplexity is that of decoding.
* **Both models come from 4-bit files**, and their weights still lie on that grid. That flatters 4-bit types.
* **Rows of 576 or 896 numbers do not fill the blocks of K-quants**, so llama.cpp's rules store most of those tensors in
  q5_0, q8_0 or such. `other` counts the tensors.
"""


def write_page(places: Mapping[str, Place], points: Sequence[Point], report: Path, howto: Path) -> Path:
    """Write REPORT.json, REPORT.md and a plot per regime that was measured, and ``howto``; returns the page.

    REPORT.json holds the logs too, so that another machine can go on from them.
    """
    models = {name: found_in(place.log, points) for name, place in places.items()}
    plots: dict[Kind, Path] = {}
    for kind in KINDS:
        regime = PLOTTED[kind]
        panels = {
            f"{name}, {engine}": own
            for name, entries in models.items()
            for engine in ENGINES
            if complete(own := of_engine(entries, engine), regime)
        }
        if panels:
            plots[kind] = draw(panels, regime, report.with_name(f"{report.name}_{kind}.png"))
    data: dict[str, Any] = {name: [one.to_dict() for one in entries] for name, entries in models.items()}
    data |= {f"{name}, log": list(place.log.lines) for name, place in places.items()}
    write_rows(report.with_suffix(".json"), data)
    page = report.with_suffix(".md")
    replace_text(page, markdown(models, plots, places, points))
    howto.parent.mkdir(parents=True, exist_ok=True)
    replace_text(howto, guide(models))
    return page


def of_engine(entries: Sequence[Found], engine: str) -> list[Found]:
    """Those of one engine."""
    return [one for one in entries if one.point.engine == engine]


def markdown(
    models: Mapping[str, Sequence[Found]],
    plots: Mapping[Kind, Path],
    places: Mapping[str, Place],
    points: Sequence[Point],
) -> str:
    """The whole page."""
    lines = [INTRO.strip(), *_conditions(models, places), *_missing(models, points)]
    for kind, plot in plots.items():
        lines += ["", f"![{PLOTTED[kind].label}: speed against perplexity over dense]({plot.name})"]
    lines += ["", "## What it says", "", *_says(models)]
    for name, entries in models.items():
        for engine in ENGINES:
            if own := of_engine(entries, engine):
                lines += ["", f"## {name}, {engine}", "", *table(own, "decode"), "", *table(own, "prefill")]
    lines += [*_sizes(models, places), *_made(places)]
    return "\n".join(lines) + "\n"


def _conditions(models: Mapping[str, Sequence[Found]], places: Mapping[str, Place]) -> list[str]:
    names = {one.perplexity.name for entries in models.values() for one in entries if one.perplexity is not None}
    machines = {line["machine"] for place in places.values() for line in place.log.lines if "machine" in line}
    rounds = {
        len(kinds["decode"]["own"])
        for place in places.values()
        for line in place.log.all(stage="speed")
        for kinds in line["batches"].values()
    }
    about = [", ".join(sorted(names)), *sorted(machines)]
    if rounds:
        about.append(f"{min(rounds)} to {max(rounds)} rounds")
    return ["", "; ".join(part for part in about if part) + "."]


def _made(places: Mapping[str, Place]) -> list[str]:
    """How every conversion was made."""
    lines = []
    for name, place in places.items():
        for line in place.log.all(stage="convert"):
            note = f" ({line['note']})" if line.get("note") else ""
            lines.append(
                f"* {name}, `{line['model']}`: `moesaic convert MODEL OUT {' '.join(line['arguments'])}`{note}"
            )
    labels = ", ".join(f"`{key}` {conversion.label}" for key, conversion in CONVERSIONS.items())
    return ["", "## What the points are", "", f"{labels}.", "", *lines] if lines else []


def _missing(models: Mapping[str, Sequence[Found]], points: Sequence[Point]) -> list[str]:
    """What the page does not have yet."""
    lines = []
    for name, entries in models.items():
        known = {one.point.key: one for one in entries}
        no_quality = [p.key for p in points if p.key not in known or known[p.key].perplexity is None]
        no_speed = [p.key for p in points if p.key not in known or not known[p.key].paces]
        for what, keys in (("perplexity", no_quality), ("speed", no_speed)):
            if keys:
                which = "all points" if len(keys) == len(points) else ", ".join(keys)
                lines.append(f"* {name}: {what} of {which}.")
    return ["", "Not measured yet:", "", *lines] if lines else []


def regimes_of(entries: Sequence[Found], kind: Kind) -> list[Regime]:
    """What was timed, fewest sequences and threads first."""
    found = {regime for one in entries for regime in one.paces if regime.kind == kind}
    return sorted(found, key=lambda regime: (regime.batch, regime.threads))


def _says(models: Mapping[str, Sequence[Found]]) -> list[str]:
    """Per model, engine and regime: the front, and whether a conversion is on it."""
    lines = []
    for name, entries in models.items():
        for engine in ENGINES:
            own = of_engine(entries, engine)
            for regime in (regime for kind in KINDS for regime in regimes_of(own, kind)):
                best = front(own, regime)
                if not best:
                    continue
                marked = [f"**{one.point.key}**" if is_conversion(one.point) else one.point.key for one in best]
                if not any(is_conversion(one.point) for one in complete(own, regime)):
                    lines.append(f"* {name}, {engine}, {regime.label}. No conversion is timed and judged yet.")
                    continue
                ours = [one for one in best if is_conversion(one.point)]
                sure = [one.point.key for one in ours if clear(one, own, regime)]
                lines.append(
                    f"* {name}, {engine}, {regime.label}. Front: {', '.join(marked)}. {_verdict(len(ours), sure)}"
                )
    return lines or ["Nothing yet: the speeds are not measured."]


def _verdict(ours: int, sure: Sequence[str]) -> str:
    if not ours:
        return "No conversion is on it."
    if not sure:
        return "Conversions are in bold; none is clear of its neighbours' intervals."
    return f"Conversions are in bold; clear of their neighbours' intervals: {', '.join(sure)}."


def table(entries: Sequence[Found], kind: Kind) -> list[str]:
    """All points of one engine, in the regimes of one kind."""
    regimes = regimes_of(entries, kind)
    about = ["point", "MB", "held", "other", "perplexity", "x dense"] if kind == "decode" else ["point", "x dense"]
    if not regimes and kind == "prefill":
        return []
    heads = [*about, *(_short(regime) for regime in regimes)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in entries:
        ratio = "" if one.over_dense is None else one.over_dense.shown()
        cells = [f"`{one.point.key}`"]
        if kind == "decode":
            perplexity = "" if one.perplexity is None else f"{one.perplexity.value:.2f}"
            cells += [_whole(one.stored_megabytes), _whole(one.megabytes), str(one.fell_back or ""), perplexity]
        cells += [ratio, *(_pace(one, regime) for regime in regimes)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _short(regime: Regime) -> str:
    return f"{regime.kind} {regime.batch} x, {regime.threads} thr"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _pace(one: Found, regime: Regime) -> str:
    pace = one.paces.get(regime)
    return "" if pace is None else f"{pace.tokens:.1f}: {pace.ratio:.2f} [{pace.low:.2f}, {pace.high:.2f}]"


SIZES = """
## What size would it take?

A simple account, from these figures (`benchmarks/payoff/cost.py`). A weight takes as long as in the dense model of the
same type. What is left over is the overhead of a converted layer: routing, and small products in place of large ones.
It is paid for where the FFN is large enough. `at best` is the speed over that dense model without overhead. The last
columns are forecasts for Qwen2.5's larger shapes, where FFNs weigh more ({ffns} million weights each) and overheads
less; they were not run. One thread, one sequence.
"""


def _sizes(models: Mapping[str, Sequence[Found]], places: Mapping[str, Place]) -> list[str]:
    heads = ["point", "regime", "x dense in its type", "overhead per layer, us", "FFN weights to pay, M", "at best"]
    heads += [f"forecast {name}" for name in LARGER]
    lines = []
    for name, entries in models.items():
        known = {one.point.key: one for one in entries}
        weights = weights_of(places[name].dense)
        rows = []
        for kind in KINDS:
            regime = PLOTTED[kind]
            for one in (one for one in entries if one.point.group in ("stock", "pruned")):
                dense = known.get(Point(DENSE, one.point.dtype).key)
                if dense is None or regime not in one.paces or regime not in dense.paces:
                    continue
                found = overhead(one, dense, regime, weights)
                speed = one.paces[regime].tokens / dense.paces[regime].tokens
                cells: list[Any] = [f"`{one.point.key}`", kind, f"{speed:.2f}", f"{found.microseconds:.0f}"]
                cells += [f"{found.pays_from / 1e6:.1f}", f"{found.at_best:.2f}"]
                rows.append([*cells, *(f"{ratio:.2f}" for ratio in found.larger.values())])
        if rows:
            lines += ["", f"### {name}: {weights.ffn / 1e6:.1f} million weights per FFN", ""]
            lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            lines += [f"| {' | '.join(row)} |" for row in rows]
    ffns = " and ".join(f"{one.ffn / 1e6:.0f}" for one in LARGER.values())
    return [SIZES.rstrip().format(ffns=ffns), *lines] if lines else []
