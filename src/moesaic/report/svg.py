"""Small charts as inline SVG. Colours are classes of the page's style, so that a chart follows light and dark.

A chart is drawn at the size at which it is seen on a phone, so that its text stays readable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 34
MOST_COLUMNS = 40
"""Of a heat map whose columns have numbers."""


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers that span [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


@dataclass
class Chart:
    """Axes and marks. Values outside the axes are not clipped: give axes that hold them.

    Attributes:
        label: What the chart shows, for those who do not see it.
        x, y: Ends of the axes.
        show: How a value of y is written.
    """

    label: str
    x: Point
    y: Point
    show: Callable[[float], str] = "{:g}".format
    x_label: str = "layer"
    width: int = WIDTH
    height: int = HEIGHT
    marks: list[str] = field(default_factory=list)

    def px(self, x: float) -> float:
        """Place of a value of x."""
        low, high = self.x
        return LEFT + (x - low) / ((high - low) or 1) * (self.width - LEFT - RIGHT)

    def py(self, y: float) -> float:
        """Place of a value of y."""
        low, high = self.y
        return self.height - BOTTOM - (y - low) / ((high - low) or 1) * (self.height - TOP - BOTTOM)

    def line(self, points: Sequence[Point], style: str, *, dots: bool = True, name: str = "") -> None:
        """A line through points; each has its value as a tooltip."""
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        if len(points) > 1:
            self.marks.append(f'<polyline class="line {style}" points="{path}"/>')
        if dots or len(points) == 1:
            for x, y in points:
                self.dot(x, y, style, f"{name + ', ' if name else ''}{self.x_label} {x:g}: {self.show(y)}")

    def dot(self, x: float, y: float, style: str, title: str, radius: float = 3.2) -> None:
        """One mark with a tooltip."""
        self.marks.append(
            f'<circle class="dot {style}" cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="{radius}">'
            f"<title>{escape(title)}</title></circle>"
        )

    def bars(self, points: Iterable[Point], style: str, spacing: float, name: str = "") -> None:
        """Bars from the x axis; ``spacing`` in units of x between their middles."""
        width = max(1.0, abs(self.px(spacing) - self.px(0)) * 0.72)
        for x, y in points:
            top, foot = self.py(y), self.py(self.y[0])
            self.marks.append(
                f'<rect class="bar {style}" x="{self.px(x) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{max(foot - top, 0):.1f}" rx="1.5"><title>'
                f"{escape(f'{name} {self.x_label} {x:g}: {self.show(y)}'.strip())}</title></rect>"
            )

    def level(self, y: float, name: str) -> None:
        """A dashed line at one value, with its name."""
        place = self.py(y)
        self.marks.append(
            f'<line class="level" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
            f'<text class="small" x="{self.width - RIGHT}" y="{place - 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )

    def text(self, x: float, y: float, text: str, dx: float = 6) -> None:
        """A name beside a mark; it stands on the other side where it would leave the chart."""
        place, anchor = self.px(x) + dx, "start"
        if place + 6.2 * len(text) > self.width:
            place, anchor = self.px(x) - dx, "end"
        where = f'x="{place:.1f}" y="{self.py(y) + 3.5:.1f}" text-anchor="{anchor}"'
        self.marks.append(f'<text class="small" {where}>{escape(text)}</text>')

    def svg(self, x_ticks: Sequence[float] | None = None, x_show: Callable[[float], str] = "{:g}".format) -> str:
        """The chart."""
        parts = [
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.label)}">'
        ]
        for y in (tick for tick in nice_ticks(*self.y) if self.y[0] - 1e-9 <= tick <= self.y[1] + 1e-9):
            place = self.py(y)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
                f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{escape(self.show(y))}</text>'
            )
        foot = self.height - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{foot}" y2="{foot}"/>')
        for x in nice_ticks(*self.x) if x_ticks is None else x_ticks:
            if self.x[0] - 1e-9 <= x <= self.x[1] + 1e-9:
                parts.append(
                    f'<text x="{self.px(x):.1f}" y="{foot + 15}" text-anchor="middle">{escape(x_show(x))}</text>'
                )
        middle = (LEFT + self.width - RIGHT) / 2
        parts.append(
            f'<text class="small" x="{middle}" y="{self.height - 4}" text-anchor="middle">{escape(self.x_label)}</text>'
        )
        return "".join([*parts, *self.marks, "</svg>"])


def layer_chart(label: str, layers: Sequence[int], y: Point, show: Callable[[float], str]) -> Chart:
    """A chart over the layers of a model."""
    return Chart(label, (min(layers) - 0.7, max(layers) + 0.7), y, show)


def layer_ticks(layers: Sequence[int]) -> list[float]:
    """A few whole numbers of layers."""
    step = max(1, math.ceil((max(layers) - min(layers) + 1) / 8))
    return [float(place) for place in range(min(layers), max(layers) + 1, step)]


def percent(value: float) -> str:
    """``75 %``."""
    return f"{100 * value:.3g} %"


def heat_map(rows: Sequence[tuple[str, Sequence[float]]], even: Sequence[float], label: str) -> str:
    """Shares per row and column, coloured by their ratio to ``even``, the even share of each row; zeros are outlined.

    Rows may have different numbers of columns. Of more than ``MOST_COLUMNS`` each row is sorted, the largest first.
    """
    columns = max(len(values) for _, values in rows)
    many = columns > MOST_COLUMNS
    cell = max(4.0, min(26.0, 560 / columns))
    gap, high = (0.5 if many else 1.5), 15
    width, height = LEFT + columns * cell + RIGHT, TOP + len(rows) * high + 26
    parts = [
        f'<svg class="heat" width="{width:.0f}" height="{height}" viewBox="0 0 {width:.1f} {height}" role="img" '
        f'aria-label="{escape(label)}">'
    ]
    for place, ((name, values), fair) in enumerate(zip(rows, even, strict=True)):
        y = TOP + place * high
        if len(rows) <= 40 or place % 2 == 0:
            parts.append(f'<text x="{LEFT - 6}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
        numbered = sorted(enumerate(values), key=lambda each: -each[1]) if many else enumerate(values)
        for column, (expert, value) in enumerate(numbered):
            ratio = value / fair if fair else 0.0
            style = "cell" if value else "unused" if many else "dead"
            title = f"layer {name}, expert {expert}: {value:.1%} of the choices, {ratio:.2f} of an even share"
            strength = 0.06 + 0.94 * min(ratio / 3, 1)
            parts.append(
                f'<rect class="{style}" x="{LEFT + column * cell:.1f}" y="{y}" width="{cell - gap:.1f}" '
                f'height="{high - 1.5}" rx="{0 if many else 2}" fill-opacity="{strength:.3f}">'
                f"<title>{escape(title)}</title></rect>"
            )
    for column in [] if many else range(0, columns, max(1, math.ceil(columns / 12))):
        parts.append(
            f'<text x="{LEFT + (column + 0.5) * cell:.1f}" y="{height - 10}" text-anchor="middle">{column}</text>'
        )
    return "".join([*parts, "</svg>"])
