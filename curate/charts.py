"""Small charts as inline SVG: bars, a stacked histogram, lines, and a before–after mark.

Colours come from the page's style sheet by class name, so that a chart follows the reader's light or dark mode and
may not need a style attribute, which the page's policy forbids. Every mark has a `<title>`: the tooltip, and what a
screen reader says. All text goes through `visible` and is escaped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

from curate.html import count, visible

WIDTH, HEIGHT = 480, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 34


def nice_step(span: float, at_most: int) -> float:
    """The smallest of 1, 2, 5 × 10ⁿ that cuts `span` into at most `at_most` parts.

    Raises:
        ValueError: `span` is not above 0.
    """
    if not span > 0:
        raise ValueError(f"span must be above 0, got {span}")
    raw = span / at_most
    power = 10.0 ** math.floor(math.log10(raw))
    # 1e-9: 0.3 / 3 is a hair above 0.1, and is still 0.1.
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def ticks(low: float, high: float, at_most: int = 5) -> list[float]:
    """Round numbers within [low, high], at most `at_most` + 1 of them."""
    if not high > low:
        return [low]
    step = nice_step(high - low, at_most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def short(value: float) -> str:
    """A tick's label: `12k`, `0.25`, `3`."""
    for bound, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= bound:
            return f"{value / (1e3 if unit == 'k' else bound):g}{unit}"
    return f"{value:g}"


def bar(parts: Sequence[tuple[str, float, str]], whole: float) -> Markup:
    """A horizontal bar: (class, amount, tooltip) one after the other, on a track of length `whole`."""
    marks, x = [], 0.0
    for kind, amount, title in parts:
        width = 100 * amount / whole if whole else 0.0
        if width > 0:
            marks.append(_rect(kind, x, 0, max(width, 0.4), 10, title))
        x += width
    label = "; ".join(title for _, _, title in parts)
    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(visible(label), Markup("").join(marks))


def histogram(
    edges: Sequence[float],
    series: Mapping[str, Sequence[int]],
    *,
    unit: str = "",
    cuts: Sequence[tuple[float, str]] = (),
    label: str = "histogram",
) -> Markup:
    """A stacked histogram; the last bin holds all that is larger.

    Args:
        edges: N+1 bounds of the bins, rising.
        series: name (also the class) → N counts; the first is at the bottom.
        unit: of the x axis, for the tooltips.
        cuts: (value, what it is) of thresholds to draw in, as far as they lie within the edges.
        label: what the chart shows, for a screen reader.
    """
    totals = [sum(column) for column in zip(*series.values(), strict=True)]
    plot = _Plot(edges[0], edges[-1], 0, max([*totals, 1]))
    marks = []
    for number, (left, right) in enumerate(itertools.pairwise(edges)):
        amounts = {name: counts[number] for name, counts in series.items()}
        said = ", ".join(f"{count(amount)} {name}" for name, amount in amounts.items())
        title = f"{short(left)}–{short(right)}{' ' + unit if unit else ''}: {said}"
        x, width = plot.x(left), plot.x(right) - plot.x(left)
        base, bars = 0, []
        for name, amount in amounts.items():
            if amount:
                top, bottom = plot.y(base + amount), plot.y(base)
                bars.append(_rect(name, x + 0.5, top, max(width - 1, 0.5), max(bottom - top, 0.5), title))
            base += amount
        # The whole column can be pointed at, not only a bar that may be one pixel high.
        reach = _rect("reach", x, TOP, width, HEIGHT - TOP - BOTTOM, title)
        marks.append(
            Markup('<g class="bin" data-bin="{}" aria-label="{}">{}{}</g>').format(
                number, visible(title), reach, Markup("").join(bars)
            )
        )
    marks += [
        Markup('<line class="cut" x1="{0}" x2="{0}" y1="{1}" y2="{2}"><title>{3}</title></line>').format(
            f"{plot.x(value):.2f}", TOP - 6, HEIGHT - BOTTOM, visible(said)
        )
        for value, said in cuts
        if edges[0] <= value <= edges[-1]
    ]
    return plot.svg(marks, label)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], *, label: str = "") -> Markup:
    """Lines over steps, one colour each (classes line-0 … line-5), with a dot at each point when there are few.

    Args:
        series: name → (x, y) points in rising x; points that are not finite are left out.
        label: what the chart shows, for a screen reader.
    """
    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    points = [point for some in finite.values() for point in some]
    if not points:
        return Markup("")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    margin = (max(ys) - min(ys)) * 0.05 or abs(ys[0]) * 0.05 or 1.0
    plot = _Plot(min(xs), max(xs), min(ys) - margin, max(ys) + margin)
    marks = [mark for number, (name, some) in enumerate(finite.items()) for mark in _line(plot, number, name, some)]
    return plot.svg(marks, label or ", ".join(series))


def _line(plot: _Plot, number: int, name: str, points: Sequence[tuple[float, float]]) -> Iterable[Markup]:
    kind = f"line-{number % 6}"
    path = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in points)
    yield Markup('<polyline class="line {}" points="{}"><title>{}</title></polyline>').format(kind, path, visible(name))
    if len(points) <= 40:
        for x, y in points:
            yield Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"><title>{}</title></circle>').format(
                kind, f"{plot.x(x):.1f}", f"{plot.y(y):.1f}", visible(f"{name}: {y:.4g} at {short(x)}")
            )


def scatter(points: Mapping[str, tuple[float, float]], *, log_x: bool = False, label: str = "") -> Markup:
    """Dots with their names beside them; points that are not finite are left out.

    Args:
        points: name → (x, y).
        log_x: x on a logarithmic scale, for amounts above 0.
        label: what the chart shows, for a screen reader.
    """
    finite = {name: at for name, at in points.items() if all(map(math.isfinite, at)) and (at[0] > 0 or not log_x)}
    if not finite:
        return Markup("")
    xs, ys = [x for x, _ in finite.values()], [y for _, y in finite.values()]
    margin = (max(ys) - min(ys)) * 0.08 or abs(ys[0]) * 0.08 or 0.5
    if log_x:
        plot: _Plot = _LogPlot(min(xs) / 1.3, max(xs) * 1.3, min(ys) - margin, max(ys) + margin)
    else:
        aside = (max(xs) - min(xs)) * 0.08 or abs(xs[0]) * 0.08 or 0.5
        plot = _Plot(min(xs) - aside, max(xs) + aside, min(ys) - margin, max(ys) + margin)
    marks = [_named_dot(plot, number, name, *at) for number, (name, at) in enumerate(finite.items())]
    return plot.svg(marks, label or ", ".join(finite))


def _named_dot(plot: _Plot, number: int, name: str, x: float, y: float) -> Markup:
    right = plot.x(x) > (LEFT + WIDTH) / 2  # the name goes where there is room
    return Markup(
        '<circle class="dot line-{}" cx="{}" cy="{}" r="4"><title>{}</title></circle>'
        '<text class="tick {}" x="{}" y="{}">{}</text>'
    ).format(
        number % 6,
        f"{plot.x(x):.1f}",
        f"{plot.y(y):.1f}",
        visible(f"{name}: {y:.4g} at {x:.4g}"),
        "end" if right else "start",
        f"{plot.x(x) + (-7 if right else 7):.1f}",
        f"{plot.y(y) + 4:.1f}",
        visible(name if len(name) <= 32 else f"…{name[-31:]}"),
    )


def change(
    before: tuple[float, float, float], after: tuple[float, float, float], low: float, high: float, verdict: str
) -> Markup:
    """One row of a before–after chart: an open mark, a filled mark, their 95 % intervals, on the scale [low, high].

    Args:
        before: value, low, high.
        after: value, low, high.
        low: left end of the scale.
        high: right end of the scale.
        verdict: class of the after mark: better, worse or same.
    """
    span = (high - low) or 1.0

    def x(value: float) -> str:
        return f"{6 + 188 * (min(max(value, low), high) - low) / span:.1f}"

    marks = [Markup('<line class="axis" x1="6" x2="194" y1="14" y2="14"/>')]
    for kind, (value, least, most), y in (("before", before, 9), (f"after {verdict}", after, 19)):
        marks.append(
            Markup(
                '<line class="interval {0}" x1="{1}" x2="{2}" y1="{3}" y2="{3}"/>'
                '<circle class="mark {0}" cx="{4}" cy="{3}" r="4"/>'
            ).format(kind, x(least), x(most), y, x(value))
        )
    label = f"before {before[0]:.4g}, after {after[0]:.4g}, {verdict}"
    return Markup('<svg class="change" viewBox="0 0 200 28" role="img" aria-label="{}">{}</svg>').format(
        label, Markup("").join(marks)
    )


class _Plot:
    """A plot's frame: data → picture coordinates, grid and tick labels."""

    def __init__(self, left: float, right: float, bottom: float, top: float) -> None:
        self.left, self.right = left, right if right > left else left + 1
        self.bottom, self.top = bottom, top if top > bottom else bottom + 1

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.bottom) / (self.top - self.bottom)

    def x_ticks(self) -> list[float]:
        return ticks(self.left, self.right, 8)

    def svg(self, marks: Sequence[Markup], label: str) -> Markup:
        grid = [self._grid(value) for value in ticks(self.bottom, self.top, 4)]
        axis = [self._tick(value) for value in self.x_ticks()]
        return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}{}</svg>').format(
            WIDTH, HEIGHT, visible(label), Markup("").join(grid), Markup("").join(marks), Markup("").join(axis)
        )

    def _grid(self, value: float) -> Markup:
        y = f"{self.y(value):.1f}"
        return Markup(
            '<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="tick end" x="{}" y="{}">{}</text>'
        ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 8, f"{self.y(value) + 4:.1f}", short(value))

    def _tick(self, value: float) -> Markup:
        return Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
            f"{self.x(value):.1f}", HEIGHT - BOTTOM + 18, short(value)
        )


class _LogPlot(_Plot):
    """A plot whose x axis is logarithmic, with ticks at 1, 2, 5 × 10ⁿ."""

    def x(self, value: float) -> float:
        share = math.log(value / self.left) / math.log(self.right / self.left)
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    def x_ticks(self) -> list[float]:
        powers = range(math.floor(math.log10(self.left)), math.ceil(math.log10(self.right)) + 1)
        steps = (1, 2, 5) if self.right < 1000 * self.left else (1,)
        found = [float(f"{factor * 10.0**power:.6g}") for power in powers for factor in steps]
        return [value for value in found if self.left <= value <= self.right]


def _rect(kind: str, x: float, y: float, width: float, height: float, title: str) -> Markup:
    return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
        kind, f"{x:.2f}", f"{y:.2f}", f"{width:.2f}", f"{height:.2f}", visible(title)
    )
