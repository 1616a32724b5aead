"""The page of the map: one table of all rows, what it says, other settings, variants."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.map import tasks
from benchmarks.map.cost import Shape
from benchmarks.map.measure import FIT_TOKENS
from benchmarks.map.plot import draw
from benchmarks.map.points import (
    Point,
    Setting,
    beaten,
    best_within,
    measured,
    perplexity_of,
    published,
    setting_of,
)
from benchmarks.map.references import WeightOnly
from benchmarks.map.rows import BY_KEY, GROUPS
from benchmarks.rows import write_rows

from moesaic.anatomy import read_anatomy
from moesaic.anatomy.base import Anatomy
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.durable import replace_text
from moesaic.evaluate.comparison import compare

WINDOW = 1024
"""Tokens per window of the main table and of the plot."""
ROWS_OF_MAP = 6
"""Rows from which on a text has a place there, if any text has so many."""
BYTES = (0.25, 0.3, 0.35, 0.45, 0.55, 0.75)
NEURONS = (0.25, 0.35, 0.5, 0.75)
TAKEN_INSTEAD = ("int8", "q4-g64")
"""What a user would take instead: nothing is said of a text on which these are not measured."""
_PUBLISHED = "from the same-budget comparison; the first layers are dense"
_GIVEN_BACK = 0.02
"""Relative error of weights below which a grid is theirs; a 4-bit grid that is not errs by about 0.1."""
_LARGEST = 10
"""Ratios beyond it are shown without an interval."""


def write_page(
    about: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    model: Path,
    results: Path,
    answers: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write map_NAME.json, .md and .png, NAME being ``about["model"]``; returns the page."""
    checkpoint = Checkpoint(model)
    anatomy = read_anatomy(checkpoint.config)
    shape, name = Shape(anatomy.d_model, anatomy.d_ff, anatomy.gated), about["model"]
    own = own_grid(checkpoint, anatomy)
    points = [replace(p, group="grid") if p.row in own and not p.setting.noise else p for p in measured(records, shape)]
    rows = Counter(p.setting for p in points)
    rows = {s: count for s, count in rows.items() if s.window == WINDOW and not s.noise}
    usual = {s for s, count in rows.items() if count >= min(ROWS_OF_MAP, max(rows.values()))}
    main = [p for p in points if p.setting in usual]
    comparison = results / f"compare_{name}.json"
    if comparison.exists():
        windows = {p.setting: p.windows for p in main}
        parameters = sum(3 * site.d_ff if shape.gated else 2 * site.d_ff for site in anatomy.sites) * anatomy.d_model
        main += published(json.loads(comparison.read_text(encoding="utf-8")), windows, parameters)
    others = [p for p in points if p not in main]
    page = results / f"map_{name}.md"
    write_rows(
        results / f"map_{name}.json",
        {
            "about": dict(about),
            "points": [p.to_dict() for p in (*main, *others)],
            "lines": list(records),
            "tasks": list(answers),
        },
    )
    replace_text(page, markdown(about, main, others, records, answers))
    draw(main, name, results / f"map_{name}.png")
    return page


def own_grid(checkpoint: Checkpoint, anatomy: Anatomy) -> set[str]:
    """Rows of few bits that give the weights of the first FFN back: those come from such a file."""
    weights = load_ffn(checkpoint, anatomy.sites[0], anatomy.activation).to(torch.float32)
    found = set()
    for row in BY_KEY.values():
        if isinstance(row.reference, WeightOnly) and row.reference.bits < 8:
            error_FD = row.reference.rounded(weights).up_FD - weights.up_FD
            if float(error_FD.norm() / weights.up_FD.norm()) < _GIVEN_BACK:
                found.add(row.key)
    return found


def markdown(
    about: Mapping[str, Any],
    main: Sequence[Point],
    others: Sequence[Point],
    records: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of the page."""
    name = about["model"]
    lines = [f"# The map: {name}", "", *_conditions(about, main), "", f"![Perplexity over dense](map_{name}.png)", ""]
    lines += ["## What it says", "", *_says(main), "", "## All rows", "", *_table(main), ""]
    if others:
        lines += ["## Other weights and windows", "", *_settings(main, others), ""]
    if asked := tasks.table(answers):
        lines += ["## Tasks", "", *asked, ""]
    variants = _variants(records)
    if variants:
        lines += ["## Variants", "", *variants, ""]
    return "\n".join(lines)


def _conditions(about: Mapping[str, Any], main: Sequence[Point]) -> list[str]:
    windows = ", ".join(f"{s.text} {_windows(p.windows for p in main if p.setting == s)}" for s in _texts(main))
    calibration = about["calibration"]
    return [
        "Perplexity over dense against what one token reads in the FFNs. Nothing is trained. Every token is masked, so "
        "the figures are those of decoding.",
        "",
        "* **Bytes** are relative to the FFN in bf16. Routers, scales and offsets count. Attention, embeddings and "
        "head are the same for all rows and are left out.",
        "* **MACs** are multiply-accumulates, at any precision, relative to the FFN. **Neurons** is the share that is "
        "computed exactly. Formulas: `benchmarks/map/cost.py`.",
        f"* Windows of {WINDOW} tokens: {windows}. Ratios are paired over windows and have their 95 % interval. Few "
        "windows make wide intervals.",
        f"* Refits are made on {', '.join(calibration['sources'])} ({calibration['tokens']} tokens), thresholds on the "
        f"first {FIT_TOKENS} of these. So refits know text like WikiText-2. C4, code and stories are "
        "text of other kinds.",
        "* **TEAL** has equal shares in all layers, for the FFN's input and for what its down projection reads. Its "
        "authors also share out between layers, which is not measured here.",
        "* 4-bit weights are rounded to nearest, in one row on the grid of least squared error. Quantisers that read "
        "text (GPTQ, AWQ) do better and are not measured here.",
        "* If the weights come from a 4-bit file, they lie on a coarse grid. That flatters 4-bit weights and 4-bit "
        "routers. A row of that very grid is the dense model, so it is left out of what the page says. The rows with "
        "noise have one step of such a grid added.",
        f"* In {about['dtype']}; {about['machine']}. Made by `python -m benchmarks.map`.",
    ]


def _says(main: Sequence[Point]) -> list[str]:
    lines: list[str] = []
    rows = {setting: {p.row for p in main if p.setting == setting} for setting in _texts(main)}
    texts = [setting for setting, own in rows.items() if own.issuperset(TAKEN_INSTEAD)] or [*rows][:1]
    for by, budgets, what in (("bytes", BYTES, "bytes per token"), ("neurons", NEURONS, "exact neurons")):
        lines += [
            f"Lowest perplexity with at most so many {what} (to within 0.005), among rows that can be built and were "
            "measured on that text. Texts without 8- and 4-bit weights are left out:",
            "",
        ]
        lines += [f"| at most | {' | '.join(s.text for s in texts)} |", "|---" * (len(texts) + 1) + "|"]
        for budget in budgets:
            cells = [_named(best_within([p for p in main if p.setting == s], budget + 5e-3, by)) for s in texts]
            lines.append(f"| {budget:g} | {' | '.join(cells)} |")
        lines.append("")
    first = [p for p in main if p.setting == texts[0]] if texts else []
    losing = beaten(first)
    if losing:
        lines += [f"Where ours loses ({texts[0].text}). The other row reads no more bytes and has no larger ratio:", ""]
        lines += [f"* {_reads(mine)}. {_reads(other)}." for mine, other in losing]
    lost = [mine for mine, _ in losing]
    winning = [p for p in first if p.ours and p.group != "variant" and p not in lost and not _outdone(p, first)]
    if winning:
        lines += ["", "No row of others reads as little and is as good as these:", ""]
        lines += [f"* {_reads(p)}." for p in winning]
    return lines


def _texts(points: Sequence[Point]) -> list[Setting]:
    return list(dict.fromkeys(p.setting for p in points))


def _windows(counts: Iterable[int]) -> str:
    """Rows of one text may have been read on more windows than others."""
    known = sorted(set(counts))
    return " to ".join(str(count) for count in dict.fromkeys((known[0], known[-1])))


def _outdone(point: Point, points: Sequence[Point]) -> bool:
    """Whether another row of ours reads no more and loses less."""
    better = (p for p in points if p.ours and p.ratio.ratio < point.ratio.ratio)
    return any(p.cost.bytes <= point.cost.bytes for p in better)


def _named(point: Point | None) -> str:
    return "none" if point is None else f"{point.label}: {point.ratio.ratio:.3f} (`{point.row}`)"


def _reads(point: Point) -> str:
    return f"{point.label} (`{point.row}`): {point.cost.bytes:.3f} of the bytes, {_ratio(point)}"


def _ratio(point: Point) -> str:
    return point.ratio.shown() if point.ratio.ratio < _LARGEST else f"{point.ratio.ratio:,.0f}"


def _table(main: Sequence[Point]) -> list[str]:
    texts = _texts(main)
    head = ["row", "neurons", "bytes", "MACs", *(s.text for s in texts)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    titles: dict[str, str] = {**GROUPS, "published": _PUBLISHED}
    for group, title in titles.items():
        rows = dict.fromkeys(p.row for p in main if p.group == group)
        if rows and group != "dense":
            lines.append(f"| *{title}* |{' |' * (len(head) - 1)}")
        for key in rows:
            here = {p.setting: p for p in main if p.row == key}
            one = next(iter(here.values()))
            cells = [f"{one.label} (`{key}`)", f"{one.neurons:.1%}", f"{one.cost.bytes:.3f}", f"{one.cost.macs:.2f}"]
            cells += [_cell(here.get(s), one) for s in texts]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(point: Point | None, first: Point) -> str:
    """The ratio; and the bytes, where this text reads others than the row's first one."""
    if point is None:
        return ""
    differs = abs(point.cost.bytes - first.cost.bytes) >= 5e-3
    return _ratio(point) + (f", bytes {point.cost.bytes:.3f}" if differs else "")


def _settings(main: Sequence[Point], others: Sequence[Point]) -> list[str]:
    """A line for each text, window and kind of weights; a column for each row of the map."""
    settings = _texts(others)
    base = [Setting(text, WINDOW) for text in dict.fromkeys(s.text for s in settings)]
    rows = list(dict.fromkeys(p.row for p in others if p.group != "dense"))
    head = ["text", "tokens per window", "weights", *(f"{BY_KEY[key].label} (`{key}`)" for key in rows)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    found = {(p.row, p.setting): _ratio(p) for p in (*main, *others)}
    for setting in dict.fromkeys((*base, *settings)):
        cells = [setting.text, str(setting.window), "with noise" if setting.noise else "as they are"]
        lines.append(f"| {' | '.join([*cells, *(found.get((key, setting), '') for key in rows)])} |")
    return lines


def _variants(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each row that has a base beside it: its perplexity over that of the base, paired over windows."""
    lines_of = {(r["row"], setting_of(r), r["windows"]): r for r in records}
    texts = list(dict.fromkeys(setting_of(r) for r in records if r["window"] == WINDOW and not r["noise"]))
    found = []
    for row in BY_KEY.values():
        cells = []
        for setting in texts:
            mine = [r for (key, s, _), r in lines_of.items() if (key, s) == (row.key, setting)]
            pairs = [(r, lines_of.get((row.base or "", setting, r["windows"]))) for r in mine]
            cells.append(
                next((compare(perplexity_of(r), perplexity_of(b)).shown() for r, b in pairs if b is not None), "")
            )
        if any(cells):
            found.append(f"| {row.label} (`{row.key}`) | `{row.base}` | {' | '.join(cells)} |")
    if not found:
        return []
    head = f"| variant | beside | {' | '.join(s.text for s in texts)} |"
    return [
        "Perplexity over that of the row beside it; below 1 the variant is better.",
        "",
        head,
        "|---" * (len(texts) + 2) + "|",
        *found,
    ]
