"""What the records of all cases come to: paired intervals, a table per text and one per fraction, JSON and Markdown.

"Best other" of a row: the converted model of lowest WikiText-2 perplexity among the rows of other methods at its
fraction. Each control counts as a method of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.compare.cases import LEFT_OUT, RECIPES, percent
from benchmarks.compare.measure import TEXTS

from moesaic.evaluate.comparison import Comparison, compare
from moesaic.evaluate.perplexity import Perplexity

Record = dict[str, Any]
MAIN = "WikiText-2"
_Z95 = 1.959964
_INTERVAL_BELOW = 10
"""Ratios to dense above this are shown in summaries without their interval: nobody chooses between them."""


def perplexity_of(record: Record, text: str) -> Perplexity:
    """The figure as moesaic's own type."""
    table = record["perplexity"][text]
    return Perplexity(**(table | {"window_nll": tuple(table["window_nll"])}))


def by_fraction(records: Iterable[Record]) -> dict[float, list[Record]]:
    """Converted models by fraction, largest first, each group ordered by perplexity on WikiText-2."""
    groups: dict[float, list[Record]] = {}
    for record in records:
        if record["case"] != "dense":
            groups.setdefault(record["fraction"], []).append(record)
    return {
        fraction: sorted(groups[fraction], key=lambda record: perplexity_of(record, MAIN).value)
        for fraction in sorted(groups, reverse=True)
    }


def accuracy_difference(
    model: Mapping[str, Sequence[int]], baseline: Mapping[str, Sequence[int]]
) -> tuple[float, float]:
    """Difference of mean task accuracies on the same questions, and half its 95 % interval.

    Paired over questions, normal approximation, the tasks taken as given. Every task counts alike, whatever its number
    of questions.
    """
    mean = variance = 0.0
    for task, answers in model.items():
        differences = [ours - theirs for ours, theirs in zip(answers, baseline[task], strict=True)]
        centre = sum(differences) / len(differences)
        spread = sum((d - centre) ** 2 for d in differences) / max(len(differences) - 1, 1)
        mean += centre / len(model)
        variance += spread / len(differences) / len(model) ** 2
    return mean, _Z95 * math.sqrt(variance)


def mean_accuracy(record: Record) -> float | None:
    """Mean over tasks; None when there were none."""
    tasks = record.get("tasks")
    return sum(sum(right) / len(right) for right in tasks.values()) / len(tasks) if tasks else None


def comparisons(records: Sequence[Record]) -> list[Record]:
    """The records as tabulated, dense first, with ``ratio_to_dense``, ``ratio_to_best_other``, ``accuracy`` added."""
    dense = next(record for record in records if record["case"] == "dense")
    rows = [dense | _accuracies(dense, dense, None)]
    for group in by_fraction(records).values():
        for record in group:
            other = next((one for one in group if compared_as(one) != compared_as(record)), None)
            row = record | {"ratio_to_dense": _ratios(record, dense)} | _accuracies(record, dense, other)
            if other is not None:
                row |= {"best_other": other["case"], "ratio_to_best_other": _ratios(record, other)}
            rows.append(row)
    return rows


def compared_as(record: Record) -> str:
    """Rows for which this is the same are variants of one method, and not each other's "best other"."""
    return record["case"] if record["label"].startswith("control") else record["settings"]["method"]


def _ratios(record: Record, other: Record) -> dict[str, dict[str, float]]:
    return {text: compare(perplexity_of(record, text), perplexity_of(other, text)).to_dict() for text in TEXTS}


def _accuracies(record: Record, dense: Record, other: Record | None) -> Record:
    if (mean := mean_accuracy(record)) is None:
        return {}
    found: Record = {"mean": mean, "tasks": {task: sum(right) / len(right) for task, right in record["tasks"].items()}}
    for name, base in (("to_dense", dense), ("to_best_other", other)):
        if base is not None and base is not record and "tasks" in base:
            difference, half = accuracy_difference(record["tasks"], base["tasks"])
            found[name] = {"difference": difference, "low": difference - half, "high": difference + half}
    return {"accuracy": found}


def markdown(about: Mapping[str, Any], rows: Sequence[Record], reasons: Mapping[str, str]) -> str:
    """The page: how it was made, all methods at all fractions, a table per fraction, what is left out."""
    dense, converted = rows[0], rows[1:]
    with_tasks = "accuracy" in dense
    lines = [f"# Same-budget comparison: {about['model']}", "", *_conditions(about, with_tasks), ""]
    values = ", ".join(f"{text} {dense['perplexity'][text]['value']:.2f}" for text in TEXTS)
    tasks = f"; mean task accuracy {dense['accuracy']['mean']:.1%}" if with_tasks else ""
    size = dense["size"]
    lines += [f"**Dense**: perplexity {values}{tasks}; {size['parameters'] / 1e6:.1f} M parameters."]
    for text in TEXTS:
        lines += ["", f"## {text}: perplexity over dense at each active fraction", "", *_summary(converted, text)]
    for fraction in dict.fromkeys(row["fraction"] for row in converted):
        group = [row for row in converted if row["fraction"] == fraction]
        lines += ["", f"## {percent(fraction)} % of the FFN neurons active", "", *_table(group, dense, with_tasks)]
    for key, options in about.get("older", {}).items():
        was = ", ".join(f"{name} = {value}" for name, value in options.items())
        lines += ["", f"`{key}` was measured under older defaults: {was}."]
    lines += ["", "## What is not in the tables", ""]
    lines += [f"* {key}: {reason}" for key, reason in {**LEFT_OUT, **reasons}.items()]
    return "\n".join([*lines, ""])


def _summary(rows: Sequence[Record], text: str) -> list[str]:
    """A row per method, in the order of the recipes, a column per fraction: the ratio, and what the text used."""
    fractions = list(dict.fromkeys(row["fraction"] for row in rows))
    names = list(dict.fromkeys(row["case"] for row in rows))
    names.sort(key=lambda name: list(RECIPES).index(name) if name in RECIPES else len(RECIPES))
    lines = [f"| method | {' | '.join(f'{percent(fraction)} %' for fraction in fractions)} |"]
    lines += ["|---" * (len(fractions) + 1) + "|"]
    for name in names:
        here = {row["fraction"]: row for row in rows if row["case"] == name}
        label = next(iter(here.values()))["label"]
        cells = [_short(here[fraction], text) if fraction in here else "" for fraction in fractions]
        lines.append(f"| {label} (`{name}`) | {' | '.join(cells)} |")
    return lines


def _short(row: Record, text: str) -> str:
    found = row["ratio_to_dense"][text]
    shown = f"{found['ratio']:,.0f}" if found["ratio"] >= _INTERVAL_BELOW else _ratio(found)
    planned, used = row["size"]["active_ffn"], row.get("active_on", {}).get(text)
    differs = used is not None and f"{used:.1%}" != f"{planned:.1%}"
    return shown + (f", {used:.1%} used" if differs else "")


def _conditions(about: Mapping[str, Any], with_tasks: bool) -> list[str]:
    calibration = about["calibration"]
    texts = ", ".join(calibration["sources"])
    text = (
        f"Calibration of every method that has one: {calibration['tokens']} tokens of {texts}, seed {about['seed']}. "
        f"Perplexity: {about['windows']} windows of WikiText-2 test and {about['c4_windows']} of C4, {about['window']} "
        f"tokens each{_dtype(about, 'dtype')}. *-lead* leaves the first {about['leading']} layers dense and gives the "
        "others less. Ratios are paired over windows, with their 95 % interval (in the summaries where they are below "
        f"{_INTERVAL_BELOW}); *best other* is the row of lowest WikiText-2 perplexity among other methods and "
        "controls, so below 1 is a win; variants of one method are not compared. KL (nats): first two windows of "
        "WikiText-2; router, on their first tokens: share of the oracle's experts that the router picks, with chance "
        "in brackets. Active in brackets, or *used*: what the tokens of a text or of the tasks used, where that is not "
        "what was planned; a question's context counts once. Seconds: of the conversion."
    )
    if with_tasks:
        limit = "all questions" if about["limit"] is None else f"first {about['limit']} questions"
        text += (
            f" Tasks, zero-shot by lm-eval, validation splits, {limit} each{_dtype(about, 'task_dtype')}: "
            f"{', '.join(about['tasks'])}; acc_norm where a task has it. Differences in points, paired over questions; "
            "empty where none were asked."
        )
    return [text, "", f"{about['machine']}. Made by `python -m benchmarks.compare`."]


def _dtype(about: Mapping[str, Any], what: str) -> str:
    return "" if about[what] == "auto" else f", in {about[what]}"


def _table(group: Sequence[Record], dense: Record, with_tasks: bool) -> list[str]:
    head = ["method", "active", "stored FFN", "parameters", "active parameters"]
    for text in TEXTS:
        head += [text, "over dense", "over best other"]
    head += ["KL", "router", "seconds (threads)", "peak GB"]
    head += ["task accuracy", "to dense", "to best other"] if with_tasks else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in group:
        lines.append(f"| {' | '.join(_cells(row, with_tasks))} |")
    return lines


def _cells(row: Record, with_tasks: bool) -> list[str]:
    size, conversion, fidelity = row["size"], row["conversion"], row["fidelity"]
    cells = [f"{row['label']} (`{row['case']}`)", _active(row), f"{size['stored_ffn']:.2f}"]
    cells += [f"{size[name] / 1e6:.1f} M" for name in ("parameters", "active_parameters")]
    for text in TEXTS:
        cells.append(f"{row['perplexity'][text]['value']:.2f}")
        cells += [_ratio(row[name][text]) if name in row else "" for name in ("ratio_to_dense", "ratio_to_best_other")]
    cells.append(f"{row['to_dense']['mean_kl']:.3f}")
    cells.append(f"{fidelity['overlap']:.0%} ({fidelity['chance']:.0%})" if fidelity else "none")
    peak = conversion["peak_bytes"]
    time = f"{conversion['seconds']:.0f} ({conversion['threads']})"
    cells += [time, "" if peak is None else f"{peak / 1e9:.1f}"]
    if with_tasks:
        accuracy = row.get("accuracy", {})
        cells.append(f"{accuracy['mean']:.1%}" if accuracy else "")
        cells += [_points(accuracy[name]) if name in accuracy else "" for name in ("to_dense", "to_best_other")]
    return cells


def _active(row: Record) -> str:
    """Active share as planned; and as the texts used it, where that differs."""
    planned = f"{row['size']['active_ffn']:.1%}"
    used = {text: f"{fraction:.1%}" for text, fraction in row.get("active_on", {}).items()}
    if set(used.values()) <= {planned}:
        return planned
    return f"{planned} ({', '.join(f'{text} {share}' for text, share in used.items())})"


def _ratio(found: Mapping[str, float]) -> str:
    return Comparison(**found).shown()


def _points(found: Mapping[str, float]) -> str:
    return f"{100 * found['difference']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
