"""From numbers to a chart's geometry: what is drawn where, in percent of the plot, for page.html to write as SVG.

The plot stretches with the page while its text keeps its size, so every position is a share of width or height.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import ClassVar

from matplotlib.ticker import MaxNLocator

Point = tuple[float, float]

MOST_POINTS = 600  # of a line; a plot is at most about as many pixels wide
MOST_READINGS = 80  # places of a chart at which the values can be read
MOST_VALUES = 1000  # that can be read from it, which decides where there are many lines
MARGIN = 0.04  # of the height, above and below what is drawn
LOG_FROM = 10.0  # ratio of largest to smallest value from which a logarithmic scale shows more
BOX = 1000  # units of a path's coordinates


@dataclass(frozen=True)
class Line:
    """What is drawn in one colour: a line, or dots where the values are few. `points` ascend in x."""

    label: str
    points: Sequence[Point]
    colour: str
    dots: bool = False

    @cached_property
    def finite(self) -> list[Point]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, in percent, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A value on the plot, in percent of its width and height from the upper left corner."""

    x: float
    y: float
    colour: str


@dataclass(frozen=True)
class Reading:
    """The values at one x: the strip from `left` that shows them while the pointer is on it, in percent."""

    at: float
    left: float
    width: float
    title: str
    values: list[tuple[str, str, str]]  # label, value, colour
    dots: list[Dot]


@dataclass(frozen=True)
class Chart:
    """Lines over one horizontal axis. `unit` is of the vertical one, which begins at zero with `from_zero`, and with
    `may_log` is logarithmic where the values span more than a factor of ten."""

    kind: ClassVar[str] = "chart"

    title: str
    unit: str
    across: str
    lines: Sequence[Line]
    from_zero: bool = False
    may_log: bool = False
    wide: bool = False
    show: Callable[[float], str] = field(default=lambda value: f"{value:#.4g}")

    @property
    def has_values(self) -> bool:
        """Whether there is anything to draw."""
        return any(line.finite for line in self.lines)

    @cached_property
    def xs(self) -> tuple[float, float]:
        """The horizontal range."""
        return _apart(*_range(x for line in self.lines for x, _ in line.finite))

    @cached_property
    def log(self) -> bool:
        """Whether the vertical axis is logarithmic."""
        low, high = _range(self._values())
        return self.may_log and low > 0 and high / low > LOG_FROM

    @cached_property
    def ys(self) -> tuple[float, float]:
        """The vertical range, on the axis' own scale."""
        low, high = map(self._scale, _range(self._values()))
        low, high = _apart(min(low, 0.0) if self.from_zero else low, high)
        room = MARGIN * (high - low)
        return low if self.from_zero and low == 0 else low - room, high + room

    def _values(self) -> Iterator[float]:
        return (y for line in self.lines for _, y in line.finite)

    def _scale(self, y: float) -> float:
        return math.log10(y) if self.log else y

    def left(self, x: float) -> float:
        """Percent of the width from the left."""
        low, high = self.xs
        return 100 * (x - low) / (high - low)

    def top(self, y: float) -> float:
        """Percent of the height from the top."""
        low, high = self.ys
        return 100 * (high - self._scale(y)) / (high - low)

    def path(self, line: Line) -> str:
        """The line as SVG's path data in a box of 1000 x 1000."""
        places = [(self.left(x) * BOX / 100, self.top(y) * BOX / 100) for x, y in thin(line.finite)]
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)

    def dots(self, line: Line) -> list[Dot]:
        """The points of a line that is drawn as dots."""
        return [Dot(self.left(x), self.top(y), line.colour) for x, y in line.finite]

    @property
    def x_ticks(self) -> list[Tick]:
        """Where the horizontal axis is marked; with one value, there."""
        return [Tick(self.left(value), plain(value)) for value in _round_values(*self.xs, whole=True)]

    @property
    def y_ticks(self) -> list[Tick]:
        """Where the vertical axis is marked."""
        low, high = self.ys
        values = _decades(low, high) if self.log else _round_values(low, high)
        return [Tick(self.top(value), plain(value)) for value in values]

    @cached_property
    def readings(self) -> list[Reading]:
        """Places spread over the width, and every one that has a dot."""
        at = [dict(line.finite) for line in self.lines]
        dotted = set(chain.from_iterable(values for line, values in zip(self.lines, at, strict=True) if line.dots))
        every = sorted(set(chain.from_iterable(at)))
        most = min(MOST_READINGS, max(1, MOST_VALUES // len(self.lines)))
        chosen = sorted({*every[:: math.ceil(len(every) / most)], *dotted})
        edges = [0.0, *((self.left(a) + self.left(b)) / 2 for a, b in pairwise(chosen)), 100.0]
        readings = []
        for index, x in enumerate(chosen):
            here = [(line, values[x]) for line, values in zip(self.lines, at, strict=True) if x in values]
            shown = [(line.label, self.show(y), line.colour) for line, y in here]
            dots = [Dot(self.left(x), self.top(y), line.colour) for line, y in here]
            width = edges[index + 1] - edges[index]
            readings.append(Reading(self.left(x), edges[index], width, f"{self.across} {plain(x)}", shown, dots))
        return readings

    @property
    def summary(self) -> str:
        """The chart in words, for who cannot see it."""
        ends = [
            f"{line.label} from {self.show(line.finite[0][1])} to {self.show(line.finite[-1][1])}"
            for line in self.lines
            if line.finite
        ]
        first, last = map(plain, self.xs)
        return f"{self.title} ({self.unit}) over {self.across} {first} to {last}: {'; '.join(ends)}"


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` of the points: the first, the last, and the lowest and highest of every stretch, so that no
    peak is lost."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(2 * len(points) / most)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)


def plain(value: float) -> str:
    """A number on an axis: "20", "1,200", "0.0004", "5e-06"."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _range(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    return (min(values), max(values)) if values else (0.0, 1.0)


def _apart(low: float, high: float) -> tuple[float, float]:
    """The range, or where it is one value, a range around it."""
    if low < high:
        return low, high
    room = abs(low) / 2 or 0.5
    return low - room, high + room


def _round_values(low: float, high: float, whole: bool = False) -> list[float]:
    """A handful of round numbers between the two."""
    locator = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 3, 5, 10], integer=whole)
    # Differences of round numbers carry errors of rounding, which `plain` would show.
    return [float(f"{value:.10g}") for value in locator.tick_values(low, high) if low <= value <= high]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten between two exponents, with 2 and 5 times them where these are few, and only some where many."""
    first, last = math.ceil(low), math.floor(high)
    if last - first < 2:
        values = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
        return [float(f"{value:.10g}") for value in values if low <= math.log10(value) <= high]
    return [10.0**power for power in range(first, last + 1, math.ceil((last - first + 1) / 6))]
