"""The charts of the reports: curves over steps, ranges of layers, signals and rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib import ticker
from matplotlib.axes import Axes

from lightning_stability.pages.svg import COLOURS, Size, draw_both

_MOST_POINTS = 600


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        x: Steps.
        y: Values; those that are not finite are gaps.
        colour: Of the page.
    """

    x: Sequence[float]
    y: Sequence[float]
    colour: str = "accent"


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step.

    Attributes:
        x: The step.
        colour: Of the page.
    """

    x: float
    colour: str


@dataclass(frozen=True)
class Span:
    """A layer's range, on a scale of sizes.

    Attributes:
        name: Of the layer.
        low: The smallest size that is not 0; None if there is none.
        high: The largest.
        middle: The mean.
        nonfinite: How many values were not finite.
        marked: Whether it is the origin.
        note: Beside its name.
    """

    name: str
    low: float | None
    high: float | None
    middle: float | None
    nonfinite: int = 0
    marked: bool = False
    note: str = ""


@dataclass(frozen=True)
class Limit:
    """Where a number format ends.

    Attributes:
        name: Such as `"fp16"`.
        value: Its largest number.
    """

    name: str
    value: float


def curves(
    title: str,
    series: Sequence[Series],
    marks: Sequence[Mark],
    log: bool,
    span: tuple[float, float] | None,
) -> Markup:
    """A chart of curves over steps, with marks where something happened.

    Args:
        title: What it shows, for those who cannot see it.
        log: Whether the values are on a log scale.
    """

    def draw(axes: Axes, size: Size) -> None:
        for one in series:
            x, y = _thinned(one.x, one.y)
            points = "." if len(x) < 2 else None
            axes.plot(x, y, color=COLOURS[one.colour], marker=points)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(numticks=5))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
            axes.yaxis.set_major_formatter(_of_sizes())
        _draw_marks(axes, marks)
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4 if size.is_narrow else 8, integer=True))
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        if not log:
            axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
            axes.yaxis.set_major_formatter(
                ticker.FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")
            )
        if span is not None and span[0] < span[1]:
            axes.set_xlim(span[0] - 0.01 * (span[1] - span[0]), span[1] + 0.01 * (span[1] - span[0]))

    return draw_both(title, draw, 170, margin=52)


def ranges(title: str, spans: Sequence[Span], limits: Sequence[Limit], axis: str) -> Markup:
    """Bars from the smallest to the largest size on a log scale, one below the other.

    Args:
        title: What it shows, for those who cannot see it.
        spans: From the top down.
    """
    low, high = _decades(spans, limits)

    def draw(axes: Axes, size: Size) -> None:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(len(spans) - 0.4, -0.8)
        for place, span in enumerate(spans):
            _draw_span(axes, place, span, size, low, high)
        drawn = [limit for limit in limits if limit.value <= high]
        for limit in drawn or limits[:1]:
            _draw_limit(axes, limit, high)
        axes.set_xlabel(axis)
        axes.xaxis.set_major_locator(ticker.LogLocator(numticks=5 if size.is_narrow else 9))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(_of_sizes())
        axes.grid(axis="x")
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        if size.is_narrow:
            axes.set_yticks([])
        else:
            axes.set_yticks(range(len(spans)), [_cut(span.name, 34) for span in spans])
            for label, span in zip(axes.get_yticklabels(), spans, strict=True):
                label.set_color(COLOURS["bad" if span.marked else "muted"])
                label.set_fontweight("bold" if span.marked else "normal")

    return draw_both(title, draw, lambda size: 62 + len(spans) * (34 if size.is_narrow else 22))


def signals(title: str, channels: Sequence[Sequence[float]], names: Sequence[str]) -> Markup:
    """Curves below each other, each on its own scale; where a value is not finite there is a mark.

    Args:
        title: What it shows, for those who cannot see it.
    """

    def draw(axes: Axes, size: Size) -> None:
        finite = [abs(v) for values in channels for v in values if math.isfinite(v)]
        scale = max(finite, default=0.0) or 1.0
        for place, values in enumerate(channels):
            x, y = _thinned(range(len(values)), values)
            axes.plot(x, [place - 0.45 * v / scale for v in y], color=COLOURS["accent"], linewidth=1.1)
            bad = [i for i, v in enumerate(values) if not math.isfinite(v)][:_MOST_POINTS]
            axes.plot(bad, [place] * len(bad), "x", color=COLOURS["bad"], markersize=6)
        axes.set_ylim(len(channels) - 0.4, -0.6)
        axes.set_yticks(range(len(channels)), [_cut(name, 10 if size.is_narrow else 20) for name in names])
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4 if size.is_narrow else 8, integer=True))

    return draw_both(title, draw, 50 + 34 * len(channels))


def bars(title: str, values: Sequence[float], names: Sequence[str]) -> Markup:
    """One bar for each value of a row; a mark where a value is not finite.

    Args:
        title: What it shows, for those who cannot see it.
        names: Of its columns; none of them are shown where there are too many.
    """

    def draw(axes: Axes, size: Size) -> None:
        places = range(len(values))
        axes.bar(places, [v if math.isfinite(v) else 0.0 for v in values], color=COLOURS["accent"], width=0.7)
        bad = [place for place in places if not math.isfinite(values[place])]
        axes.plot(bad, [0.0] * len(bad), "x", color=COLOURS["bad"], markersize=7)
        largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
        if largest > 1e4:
            axes.set_yscale("symlog", linthresh=1.0)
        axes.axhline(0.0, color=COLOURS["line"], linewidth=1.0)
        most = 8 if size.is_narrow else 24
        axes.xaxis.set_major_locator(ticker.MaxNLocator(most, integer=True))
        if names and len(names) <= most:
            axes.set_xticks(places, [_cut(name, 10) for name in names])
        axes.tick_params(length=0)
        axes.grid(axis="y")

    return draw_both(title, draw, 150)


def _draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    """Lines where there are few, else ticks at the foot."""
    few = len(marks) <= 12
    by_colour: dict[str, list[float]] = {}
    for mark in marks:
        by_colour.setdefault(mark.colour, []).append(mark.x)
    for colour, places in by_colour.items():
        for x in places if few else ():
            axes.axvline(x, color=COLOURS[colour], linewidth=1.1, linestyle=(0, (3, 2)))
        if not few:
            shown = sorted(set(places))[:: max(1, len(set(places)) // _MOST_POINTS)]
            axes.plot(
                shown,
                [0.03] * len(shown),
                "|",
                color=COLOURS[colour],
                markersize=9,
                transform=axes.get_xaxis_transform(),
            )


def _draw_span(axes: Axes, place: int, span: Span, size: Size, low: float, high: float) -> None:
    colour = COLOURS["bad" if span.marked or span.nonfinite else "accent"]
    if span.marked:
        axes.axhspan(place - 0.5, place + 0.5, color=COLOURS["sunken"], linewidth=0, zorder=0)
    if span.high is not None:
        start, end = max(span.low or span.high, low), max(span.high, low)
        axes.plot([start, end], [place, place], color=colour, linewidth=6, solid_capstyle="round", alpha=0.45)
        if span.middle:
            axes.plot([max(span.middle, low)], [place], "o", color=colour, markersize=5)
    right = f"{span.nonfinite:,} not finite" if span.nonfinite else ""
    if right:
        axes.text(high, place, right, color=COLOURS["bad"], ha="right", va="center", fontsize=10.5)
    if size.is_narrow:
        name = f"{_cut(span.name, 30)}{'  (origin)' if span.marked else ''}"
        weight = "bold" if span.marked else "normal"
        axes.text(
            low,
            place - 0.3,
            name,
            color=COLOURS["bad" if span.marked else "muted"],
            va="bottom",
            fontsize=10.5,
            fontweight=weight,
        )
    elif span.marked and not right:
        axes.text(high, place, "origin", color=COLOURS["bad"], ha="right", va="center", fontsize=10.5)


def _of_sizes() -> Any:
    """Powers of ten as plain text."""

    def written(value: float, _: Any) -> str:
        return f"{value:g}" if 0.01 <= value < 1e5 else f"1e{round(math.log10(value))}"

    return ticker.FuncFormatter(written)


def _draw_limit(axes: Axes, limit: Limit, high: float) -> None:
    if limit.value <= high:
        axes.axvline(limit.value, color=COLOURS["warn"], linewidth=1.4)
        axes.text(
            limit.value, -0.8, f"{limit.name} ends ", color=COLOURS["warn"], ha="right", va="bottom", fontsize=10.5
        )
    else:
        axes.text(
            high,
            -0.8,
            f"{limit.name} ends at {limit.value:.2g} \u2192",
            color=COLOURS["warn"],
            ha="right",
            va="bottom",
            fontsize=10.5,
        )


def _decades(spans: Sequence[Span], limits: Sequence[Limit]) -> tuple[float, float]:
    """The ends of the axis: what was measured, and the limits that are not far beyond it."""
    sizes = [v for span in spans for v in (span.low, span.high, span.middle) if v]
    smallest, largest = min(sizes, default=1.0), max(sizes, default=1.0)
    near = [limit.value for limit in limits if limit.value <= largest * 1e8]
    top = max([largest, *near])
    bottom = max(smallest, largest * 1e-12, 1e-45)
    return 10.0 ** (math.floor(math.log10(bottom)) - 0.1), 10.0 ** min(math.ceil(math.log10(top)) + 1.2, 40)


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most so many points, the smallest and the largest of each piece among them."""
    if len(x) <= _MOST_POINTS:
        return list(x), list(y)
    size = math.ceil(2 * len(x) / _MOST_POINTS)
    kept: list[int] = []
    for start in range(0, len(x), size):
        piece = range(start, min(start + size, len(x)))
        told = [i for i in piece if math.isfinite(y[i])] or [start]
        kept += sorted({min(told, key=lambda i: y[i]), max(told, key=lambda i: y[i])})
    return [x[i] for i in kept], [y[i] for i in kept]


def _cut(name: str, most: int) -> str:
    """The end of a long name says more than its beginning."""
    name = "".join(c if c.isprintable() else " " for c in name)
    return name if len(name) <= most else f"\u2026{name[1 - most :]}"
