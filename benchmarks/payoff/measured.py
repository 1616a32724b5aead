"""From the log's lines to points with ratios: perplexity and speed over the dense model, each with its interval."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.payoff.log import Log
from benchmarks.payoff.points import BASE, Point
from benchmarks.payoff.quality import quality_of

from moesaic.evaluate.comparison import Comparison, compare
from moesaic.evaluate.perplexity import Perplexity

Kind = Literal["decode", "prefill"]


@dataclass(frozen=True)
class Regime:
    """What is timed: decoding or prompts, with so many threads and sequences at a time."""

    kind: Kind
    threads: int
    batch: int

    @property
    def label(self) -> str:
        """For people."""
        many = "one sequence" if self.batch == 1 else f"{self.batch} sequences"
        return f"{self.kind}, {many}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Pace:
    """Tokens per second, and the ratio to the dense model within a round: the median, the least and the largest."""

    tokens: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Found:
    """What is known of a point. None and absent regimes are not measured yet."""

    point: Point
    perplexity: Perplexity | None
    over_dense: Comparison | None
    stored_megabytes: float | None
    fell_back: int
    megabytes: float | None
    paces: Mapping[Regime, Pace]

    def to_dict(self) -> dict[str, Any]:
        """For payoff.json."""
        paces = [{**vars(regime), **asdict(pace)} for regime, pace in self.paces.items()]
        return {
            "point": self.point.key,
            "engine": self.point.engine,
            "group": self.point.group,
            "perplexity": None if self.perplexity is None else self.perplexity.to_dict(),
            "over_dense": None if self.over_dense is None else self.over_dense.to_dict(),
            "stored_megabytes": self.stored_megabytes,
            "fell_back": self.fell_back,
            "megabytes": self.megabytes,
            "paces": paces,
        }


def found_in(log: Log, points: Sequence[Point]) -> list[Found]:
    """The points of which the log says something."""
    entries = [_found(log, point) for point in points]
    return [one for one in entries if one.perplexity is not None or one.paces]


def _found(log: Log, point: Point) -> Found:
    lines = log.all(stage="quality", point=point.key)
    own, base = quality_of(lines), quality_of(log.all(stage="quality", point=BASE[point.engine]))
    if own is not None and base is not None and own.name != base.name:
        base = quality_of(log.all(stage="quality", point=BASE[point.engine]), own.name)
    export, speeds = log.find(stage="export", point=point.key), log.all(stage="speed", point=point.key)
    paces: dict[Regime, Pace] = {}
    for line in speeds:
        for batch, kinds in line["batches"].items():
            for kind, rounds in kinds.items():
                paces[Regime(kind, line["threads"], int(batch))] = pace(rounds["own"], rounds["base"])
    return Found(
        point,
        own,
        None if own is None or base is None else compare(own, base),
        lines[-1]["stored_megabytes"] if lines else None,
        export["fell_back"] if export else 0,
        speeds[0]["megabytes"] if speeds else None,
        paces,
    )


def pace(own: Sequence[float], base: Sequence[float]) -> Pace:
    """Of tokens per second in the same rounds."""
    ratios = [one / other for one, other in zip(own, base, strict=True)]
    return Pace(statistics.median(own), statistics.median(ratios), min(ratios), max(ratios))


def complete(entries: Iterable[Found], regime: Regime) -> list[Found]:
    """Those whose perplexity over dense and pace in the regime are known."""
    return [one for one in entries if one.over_dense is not None and regime in one.paces]


def front(entries: Sequence[Found], regime: Regime, absolute: bool = False) -> list[Found]:
    """The points that no other beats: as fast, as good, and better in one of both. Slowest first.

    Of one engine by ratios to its dense model; ``absolute``: of all by tokens per second and perplexity.
    """
    known = complete(entries, regime)
    places = {one.point.key: _place(one, regime, absolute) for one in known}

    def beaten(one: Found) -> bool:
        mine = places[one.point.key]
        return any(p != mine and p[0] >= mine[0] and p[1] >= mine[1] for p in places.values())

    return sorted((one for one in known if not beaten(one)), key=lambda one: places[one.point.key])


def _place(one: Found, regime: Regime, absolute: bool) -> tuple[float, float]:
    """Speed and quality, more is better of both."""
    assert one.perplexity is not None
    assert one.over_dense is not None
    if absolute:
        return one.paces[regime].tokens, -one.perplexity.value
    return one.paces[regime].ratio, -one.over_dense.ratio


def clear(one: Found, entries: Sequence[Found], regime: Regime) -> bool:
    """Whether a point of an engine is on the front whatever the intervals hide.

    Every other point must be slower in all its rounds than this one in any, or lose more with 95 % confidence.
    """
    for other in complete(entries, regime):
        slower = other.paces[regime].high < one.paces[regime].low
        if other.point.key != one.point.key and not slower and not _worse(other, one):
            return False
    return True


def _worse(other: Found, one: Found) -> bool:
    assert other.perplexity is not None
    assert one.perplexity is not None
    low = compare(other.perplexity, one.perplexity).low
    return low is not None and low > 1
