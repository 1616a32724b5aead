"""From measured lines and the published comparison to points of the map: ratio to dense, and cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.map import cost
from benchmarks.map.cost import Cost, Shape, Used
from benchmarks.map.rows import BY_KEY

from moesaic.evaluate.comparison import Comparison, compare
from moesaic.evaluate.perplexity import Perplexity

PUBLISHED = {
    "union-lead": "token clusters, stored once",
    "refit-lead": "static pruning, refitted",
    "static-lead": "static pruning",
}
"""Cases of the same-budget comparison that have a place on the map; all leave the first layers dense."""
OURS = ("ours", "variant")
"""Groups of what moesaic can make, or could; of the published cases token clusters alone."""


@dataclass(frozen=True)
class Setting:
    """Under which a point was measured; ``window`` tokens per window, ``noise`` on the weights."""

    text: str
    window: int = 1024
    noise: bool = False


@dataclass(frozen=True)
class Point:
    """A row on one text: its ratio to dense, what its tokens used, and the cost of that."""

    row: str
    label: str
    group: str
    setting: Setting
    windows: int
    ratio: Comparison
    neurons: float
    cost: Cost

    @property
    def series(self) -> str:
        """The row without its percentage."""
        return self.row.partition("@")[0]

    @property
    def ours(self) -> bool:
        """Whether it is a method of ours."""
        return self.group in OURS or self.series == "union-lead"

    @property
    def buildable(self) -> bool:
        """The oracle cannot be built, and nothing is told by the dense model, also on its own grid."""
        return self.group not in ("bound", "dense", "grid")

    def to_dict(self) -> dict[str, Any]:
        """For map_MODEL.json."""
        return asdict(self)


def perplexity_of(record: Mapping[str, Any]) -> Perplexity:
    """A line's or a comparison's perplexity."""
    found = record.get("perplexity", record)
    return Perplexity(found["name"], found["value"], found["predicted"], tuple(found["window_nll"]))


def setting_of(record: Mapping[str, Any]) -> Setting:
    """Under which a line was measured."""
    return Setting(record["text"], record["window"], record["noise"])


def measured(records: Sequence[Mapping[str, Any]], shape: Shape) -> list[Point]:
    """A point per line that has a dense one of the same windows, in the order of ``ROWS``; a later line counts."""
    lines = {(record["row"], setting_of(record), record["windows"]): record for record in records}
    order = {key: number for number, key in enumerate(BY_KEY)}
    points = []
    for (key, setting, windows), record in lines.items():
        dense = lines.get(("dense", setting, windows))
        if dense is None or key not in BY_KEY:
            continue
        row, used = BY_KEY[key], Used(record["used"]["inputs"], record["used"]["neurons"])
        ratio = compare(perplexity_of(record), perplexity_of(dense))
        price = row.reference.cost(shape, used)
        points.append(Point(key, row.label, row.group, setting, windows, ratio, used.neurons, price))
    return sorted(points, key=lambda point: order[point.row])


def published(comparison: Mapping[str, Any], windows: Mapping[Setting, int], ffn_parameters: int) -> list[Point]:
    """Points of the same-budget comparison, on as many of its windows as the map has of a text.

    Args:
        comparison: compare_MODEL.json.
        windows: Windows of each setting of the map.
        ffn_parameters: Of all FFNs of the dense model.
    """
    dense, *rows = comparison["rows"]
    points = []
    for row in rows:
        for setting, count in windows.items():
            found, against = (each["perplexity"].get(setting.text) for each in (row, dense))
            same = setting.window == comparison["about"]["window"] and not setting.noise
            if row["case"] not in PUBLISHED or found is None or not same:
                continue
            neurons = row.get("active_on", {}).get(setting.text, row["size"]["active_ffn"])
            stored = dense["size"]["parameters"] + (row["size"]["stored_ffn"] - 1) * ffn_parameters
            router = max(0.0, (row["size"]["parameters"] - stored) / ffn_parameters)
            price = cost.with_router(Used(neurons=neurons), router)
            ratio = compare(*(first_windows(perplexity_of(each), count) for each in (found, against)))
            percent = f"{100 * row['fraction']:g}"
            label = f"{PUBLISHED[row['case']]}, {percent} %"
            key = f"{row['case']}@{percent}"
            points.append(Point(key, label, "published", setting, count, ratio, neurons, price))
    return sorted(points, key=lambda point: list(PUBLISHED).index(point.series))


def first_windows(found: Perplexity, count: int) -> Perplexity:
    """The perplexity on the first ``count`` windows, at most all."""
    per_window = found.predicted // len(found.window_nll)
    nll = found.window_nll[:count]
    return Perplexity(f"first {len(nll)}", found.value, per_window * len(nll), nll)


def best_within(points: Iterable[Point], budget: float, by: str) -> Point | None:
    """The buildable point of lowest ratio with at most ``budget`` of ``by``: bytes or neurons."""
    fitting = [p for p in points if p.buildable and p.group != "variant" and amount(p, by) <= budget]
    return min(fitting, key=lambda point: point.ratio.ratio, default=None)


def amount(point: Point, by: str) -> float:
    """The bytes or the neurons of a point."""
    return point.neurons if by == "neurons" else point.cost.bytes


def beaten(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Points of ours, each with the best point of others that reads no more bytes and has no larger ratio."""
    found = []
    for mine in points:
        others = [p for p in points if p.buildable and not p.ours and p.cost.bytes <= mine.cost.bytes]
        best = min(others, key=lambda point: point.ratio.ratio, default=None)
        if mine.ours and mine.group != "variant" and best is not None and best.ratio.ratio <= mine.ratio.ratio:
            found.append((mine, best))
    return found
