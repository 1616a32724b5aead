"""The page and the plot of benchmarks/stability.py, from its rows: one per method and layer.

A row has ``row``, ``label``, ``layer``, ``reads`` (what depends on the text: ``text``: the split, ``router``: the
router alone, ``nothing``), and ``pairs`` and ``domains`` as ``benchmarks.stability.Site.measure`` returns them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy.stats import t as student

SECOND_HALF, SEED = "halves", "seeds"
CONTROLS = ("static", "refit")
LEFT_OUT = {
    "ToMoE, Secret MoE": "they train; a plan here would be a training run each",
    "MLPMoE": "nothing is routed, and no text or seed is read: its split is always the same",
    "Perplexity, and errors that add up over layers": "each FFN is measured alone, on the dense model's inputs",
}
NAMES = {
    "wikitext": "WikiText",
    "c4": "C4",
    "tiny": "stories",
    "wiki": "Wikipedia",
    SECOND_HALF: "other half",
    SEED: "other seed, order",
}

Groups = dict[str, list[dict[str, Any]]]
"""Rows by method, one per layer."""


def grouped(rows: Sequence[dict[str, Any]]) -> Groups:
    """Rows by method, in order."""
    return {row["row"]: [other for other in rows if other["row"] == row["row"]] for row in rows}


def markdown(about: dict[str, Any], rows: Sequence[dict[str, Any]], left_out: dict[str, str], plot: str) -> str:
    """The page; every figure is the mean over the layers unless it says otherwise.

    ``left_out``: what is not in it, and why; ``plot``: the image's file name.
    """
    groups, domains = grouped(rows), about["domains"]
    home, *away = domains
    lines = [
        *_conditions(about, rows),
        "",
        *(f"* {sentence}" for sentence in reading(groups, home, away)),
        "",
        f"![agreement and error]({plot})",
        "",
        *_agreement(groups, home, away),
        "",
        *_worth(groups, domains),
        "",
        "## What is not in the tables",
        "",
        *(f"* {name}: {reason}." for name, reason in left_out.items()),
    ]
    return "\n".join(lines) + "\n"


def _conditions(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    layers = ", ".join(str(layer) for layer in sorted({row["layer"] for row in rows}))
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return [
        f"# Stability of splits, and routers on other text: {about['model']}",
        "",
        f"FFNs of layers {layers} of the dense model, {about['active']} % of the neurons active, settings of the "
        f"same-budget comparison. Every plan is made from {about['tokens']} tokens and measured on {about['held']} "
        f"held-out tokens of each text ({', '.join(map(_name, about['domains']))}: the shipped samples, windows of "
        f"{about['window']} tokens; calibration and measurement are different parts of a text). Means over the layers. "
        "The error is that of an FFN by itself and counts tokens alike, so the plans do too.",
        "",
        f"Inputs in {about['stream']}, plans and errors in float32; seed {about['seed']}; threads {about['threads']}; "
        f"{about['machine']}; {versions}; {sum(row['seconds'] for row in rows) / 60:.0f} minutes of processor "
        "time besides the model's own. Made by `python -m benchmarks.stability`.",
    ]


def _agreement(groups: Groups, home: str, away: list[str]) -> list[str]:
    return [
        "## What a token uses",
        "",
        f"Jaccard index of the neurons that a token uses under a plan from {_name(home)} and under one from another "
        "half of the same text, from the same text with another seed and the neurons in another order, or from another "
        "text; mean over the held-out tokens of all texts. In brackets: expected of random sets of these sizes. A "
        "dash: the plan does not depend on that.",
        "",
        *_pairs(groups, away, "used", "used_random", {"text", "router"}),
        "",
        "## The split itself",
        "",
        "Shared neurons: Jaccard index of the two sets (random sets in brackets).",
        "",
        *_pairs(groups, away, "shared", "shared_random", {"text"}),
        "",
        "Experts without common neurons: adjusted Rand index over the neurons routed in both plans. 1 is the same "
        "partition, 0 is expected of independent ones.",
        "",
        *_pairs(groups, away, "rand", None, {"text"}),
        "",
        "All experts: mean Jaccard index under the best one-to-one matching; in brackets after a random permutation of "
        "one plan's routed neurons.",
        "",
        *_pairs(groups, away, "matched", "matched_random", {"text"}),
    ]


def _worth(groups: Groups, domains: list[str]) -> list[str]:
    home, *away = domains
    return [
        "## Routers",
        "",
        "Share of the oracle's experts (those of largest output energy) that the router picks, with a plan from "
        f"{_name(home)}; in brackets with one from the text measured on. Dead: most experts of a layer that no token "
        "of a text chose.",
        "",
        *_routers(groups, domains),
        "",
        f"Share of the routed experts' output energy that the router from {_name(home)} keeps, and what its oracle "
        "would keep.",
        "",
        *_energies(groups, domains),
        "",
        *_activity(groups, domains),
        "## Error of the output",
        "",
        f"Mean over tokens of |y - y'|^2 / |y|^2 with plans from {_name(home)}; in brackets with plans from the text "
        "measured on. Bold: below the better static control, beyond the 95 % interval of the paired differences of "
        f"windows. The last two columns are on {_name(home)}, with plans from its other half and with another seed and "
        "order. Neurons per token are equal, but for experts of different widths, above; overlapping experts store "
        "more of them.",
        "",
        *_errors(groups, domains),
        "",
        f"By layer, plans from {_name(home)}: error on {_name(home)} / mean error on the other texts.",
        "",
        *_layers(groups, home, away),
    ]


def reading(groups: Groups, home: str, away: list[str]) -> list[str]:
    """What the tables say, in sentences."""
    moving = {name: records for name, records in groups.items() if records[0]["reads"] != "nothing"}
    found = [*_of_splits(moving, home, away), *_of_routers(_routed(groups), home, away)]
    if moving and away:
        price = {
            name: fmean(
                _mean(records, "domains", d, "error") / _mean(records, "domains", d, "own", "error") for d in away
            )
            for name, records in moving.items()
        }
        found.append(
            f"On the other texts the error of plans from {_name(home)} is {_range(groups, price, '.2f')} times that of "
            "plans made from those texts."
        )
    if any(control in groups for control in CONTROLS):
        domains = [home, *away]
        below = {name: [d for d in domains if verdict(groups, name, d) < 0] for name in groups}
        wins = [f"{groups[name][0]['label']} on {', '.join(map(_name, on))}" for name, on in below.items() if on]
        beaten = [name for name in _routed(groups) if all(verdict(groups, name, d) > 0 for d in domains)]
        found += [
            f"Error below that of the better static control, plans from {_name(home)}: {'; '.join(wins) or 'none'}.",
            f"Above it on every text: {_labels(groups, beaten)}.",
        ]
    return found


def _of_splits(moving: Groups, home: str, away: list[str]) -> list[str]:
    if not moving or not away:
        return []
    halves = {name: beyond_chance(records, SECOND_HALF) for name, records in moving.items()}
    texts = {name: fmean(beyond_chance(records, pair) for pair in away) for name, records in moving.items()}
    changes = {
        name: max(
            abs(_mean(records, "pairs", pair, "error") / _mean(records, "domains", home, "error") - 1)
            for pair in (SECOND_HALF, SEED)
        )
        for name, records in moving.items()
    }
    found = [
        "Of what a token uses, beyond what random sets have in common, plans from another half of the text agree "
        f"by {_range(moving, halves)}; plans from another text by {_range(moving, texts)}.",
        f"Error on {_name(home)} with another half of the text, or another seed and order of the neurons: changed "
        f"by {_range(moving, changes)}.",
    ]
    ordered = []
    for records in moving.values():
        half, order = (_mean(records, "pairs", pair, "rand") for pair in (SECOND_HALF, SEED))
        if records[0]["reads"] == "text" and half - order > 0.1:
            ordered.append(f"{records[0]['label']} {half:.2f} and {order:.2f}")
    if ordered:
        found.append(
            "Adjusted Rand index of the experts with another half of the text, and lower, with the same text and the "
            f"neurons in another order, so that their order makes the agreement and not the text: {'; '.join(ordered)}."
        )
    return found


def _of_routers(routers: Groups, home: str, away: list[str]) -> list[str]:
    chance = {name: _mean(records, "domains", home, "chance") for name, records in routers.items()}
    lead = {name: _mean(records, "domains", home, "overlap") - chance[name] for name, records in routers.items()}
    found = []
    if away and (leading := [name for name, value in lead.items() if value > 0.05]):
        kept = {
            name: fmean(_mean(routers[name], "domains", d, "overlap") - chance[name] for d in away) / lead[name]
            for name in leading
        }
        found.append(
            f"Of their lead over chance on {_name(home)}, routers keep {_range(routers, kept)} on the other texts."
        )
    if idle := [name for name, value in lead.items() if value <= 0.05]:
        found.append(f"Within 5 points of chance, or below it, on {_name(home)} itself: {_labels(routers, idle)}.")
    return found


def beyond_chance(records: list[dict[str, Any]], pair: str) -> float:
    """Agreement of what a token uses, on the scale from random sets (0) to the same sets (1)."""
    used, random = (_mean(records, "pairs", pair, key) for key in ("used", "used_random"))
    return (used - random) / (1 - random) if random < 1 else 1.0


def verdict(groups: Groups, name: str, domain: str) -> int:
    """Error of a method against the better static control on a domain: -1 below, 1 above, 0 where the 95 % interval (t)
    of the paired differences of windows holds 0, for controls and without any. A window is the mean over layers."""
    best = best_control(groups, domain)
    if name in CONTROLS or best is None:
        return 0
    mine_N, control_N = (
        torch.tensor([record["domains"][domain]["windows"] for record in groups[row]]).double().mean(dim=0)
        for row in (name, best)
    )
    difference_N = mine_N - control_N
    windows = len(difference_N)
    if windows < 2:
        return 0
    half = float(student.ppf(0.975, windows - 1) * difference_N.std() / windows**0.5)
    mean = float(difference_N.mean())
    return 0 if abs(mean) <= half else (1 if mean > 0 else -1)


def best_control(groups: Groups, domain: str) -> str | None:
    """The static control of smaller error on a domain, calibrated on the first one."""
    found = [control for control in CONTROLS if control in groups]
    return min(found, key=lambda control: _mean(groups[control], "domains", domain, "error"), default=None)


def draw(rows: Sequence[dict[str, Any]], domains: Sequence[str], out: Path) -> None:
    """Write the image ``out``: agreement by what differs, and error over the better static control's by text."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = grouped(rows)
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    agreement, error = figure.subplots(1, 2)
    colours = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    pairs = [SECOND_HALF, SEED, *domains[1:]]
    for colour, records in zip(colours, groups.values(), strict=False):
        style = {"color": colour, "marker": "o", "linewidth": 1, "label": records[0]["label"]}
        if records[0]["reads"] != "nothing":
            agreement.plot([_name(pair) for pair in pairs], [beyond_chance(records, pair) for pair in pairs], **style)
        errors = [_mean(records, "domains", domain, "error") for domain in domains]
        bests = [best_control(groups, domain) for domain in domains]
        floor = [
            1.0 if b is None else _mean(groups[b], "domains", d, "error") for b, d in zip(bests, domains, strict=True)
        ]
        error.plot([_name(d) for d in domains], [e / f for e, f in zip(errors, floor, strict=True)], **style)
    agreement.set_ylabel("neurons used: agreement, 0 random, 1 the same")
    error.set_ylabel("error over that of the better static control")
    for axis in (agreement, error):
        axis.grid(alpha=0.3)
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.savefig(out, dpi=110, metadata={"Software": None})


def _name(domain: str) -> str:
    return NAMES.get(domain, domain)


def _labels(groups: Groups, names: Sequence[str]) -> str:
    return ", ".join(groups[name][0]["label"] for name in names) or "none"


def _range(groups: Groups, values: dict[str, float], form: str = ".0%") -> str:
    """``10 % (one method) to 40 % (another)``."""
    ends = [min(values, key=values.__getitem__), max(values, key=values.__getitem__)]
    return " to ".join(f"{values[name]:{form}} ({groups[name][0]['label']})" for name in dict.fromkeys(ends))


def _mean(records: list[dict[str, Any]], *path: str) -> float:
    """Mean over layers; NaN where a layer has no such figure."""
    values = []
    for record in records:
        found: Any = record
        for key in path:
            found = found[key]
        values.append(math.nan if found is None else found)
    return fmean(values)


def _table(head: Sequence[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [list(head), ["---"] * len(head), *lines]]


def _pairs(groups: Groups, away: list[str], key: str, random: str | None, reading: set[str]) -> list[str]:
    """A table of agreements; of rows that do not read text in one of these ways, only that of the seed."""
    lines = []
    for records in groups.values():
        if math.isnan(_mean(records, "pairs", SEED, key)):
            continue
        cells = [records[0]["label"]]
        for pair in (SECOND_HALF, SEED, *away):
            value = _mean(records, "pairs", pair, key)
            beside = "" if random is None else f" ({_mean(records, 'pairs', pair, random):.2f})"
            depends = pair == SEED or records[0]["reads"] in reading
            cells.append(f"{value:.2f}{beside}" if depends else "-")
        lines.append(cells)
    return _table(["method", *map(_name, (SECOND_HALF, SEED, *away))], lines)


def _routed(groups: Groups) -> Groups:
    return {n: records for n, records in groups.items() if "overlap" in next(iter(records[0]["domains"].values()))}


def _routers(groups: Groups, domains: list[str]) -> list[str]:
    lines = []
    for records in _routed(groups).values():
        cells = [records[0]["label"], f"{_mean(records, 'domains', domains[0], 'chance'):.0%}"]
        for domain in domains:
            own = "" if domain == domains[0] else f" ({_mean(records, 'domains', domain, 'own', 'overlap'):.0%})"
            cells.append(f"{_mean(records, 'domains', domain, 'overlap'):.0%}{own}")
        dead = max(record["domains"][domain]["dead"] for record in records for domain in domains)
        lines.append([*cells, str(dead)])
    return _table(["method", "chance", *map(_name, domains), "dead"], lines)


def _energies(groups: Groups, domains: list[str]) -> list[str]:
    lines = []
    for records in _routed(groups).values():
        kept = [[_mean(records, "domains", d, f"energy_{who}") for who in ("router", "oracle")] for d in domains]
        lines.append([records[0]["label"], *(f"{router:.0%} of {oracle:.0%}" for router, oracle in kept)])
    return _table(["method", *map(_name, domains)], lines)


def _activity(groups: Groups, domains: list[str]) -> list[str]:
    """A section for methods whose experts differ in width; nothing without any."""
    lines = []
    for records in groups.values():
        if "active" in records[0]["domains"][domains[0]]:
            used = (_mean(records, "domains", d, "active") for d in domains)
            own = (_mean(records, "domains", d, "own", "active") for d in domains)
            cells = [f"{here:.1%} ({there:.1%})" for here, there in zip(used, own, strict=True)]
            lines.append([records[0]["label"], *cells])
    if not lines:
        return []
    return [
        "## Neurons that a token uses",
        "",
        f"Where experts differ in width: share of the FFN's neurons with plans from {_name(domains[0])}; in brackets "
        "with plans from the text measured on.",
        "",
        *_table(["method", *map(_name, domains)], lines),
        "",
    ]


def _errors(groups: Groups, domains: list[str]) -> list[str]:
    lines = []
    for name, records in groups.items():
        cells = [records[0]["label"]]
        for domain in domains:
            cell = f"{_mean(records, 'domains', domain, 'error'):.3f}"
            cell = f"**{cell}**" if verdict(groups, name, domain) < 0 else cell
            own = "" if domain == domains[0] else f" ({_mean(records, 'domains', domain, 'own', 'error'):.3f})"
            cells.append(cell + own)
        cells += [f"{_mean(records, 'pairs', pair, 'error'):.3f}" for pair in (SECOND_HALF, SEED)]
        lines.append(cells)
    return _table(["method", *map(_name, (*domains, SECOND_HALF, SEED))], lines)


def _layers(groups: Groups, home: str, away: list[str]) -> list[str]:
    layers = sorted({record["layer"] for records in groups.values() for record in records})
    lines = []
    for records in groups.values():
        cells = dict.fromkeys(layers, "")
        for record in records:
            errors = {domain: found["error"] for domain, found in record["domains"].items()}
            elsewhere = fmean([errors[domain] for domain in away] or [math.nan])
            cells[record["layer"]] = f"{errors[home]:.3f} / {elsewhere:.3f}"
        lines.append([records[0]["label"], *cells.values()])
    return _table(["method", *(f"layer {layer}" for layer in layers)], lines)
