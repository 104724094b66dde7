"""Inline SVG whose colours and font are those of the page, in a wide and in a narrow form."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "ink": "#010203", "muted": "#010204", "line": "#010205", "sunken": "#010206",
    "accent": "#010207", "bad": "#010208", "warn": "#010209", "good": "#01020a",
    "second": "#01020b", "third": "#01020c",
}  # fmt: skip
"""Stand-ins for the page's colours in what matplotlib writes."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a layer's name is no formula
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "axes.formatter.useoffset": False,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.7,
    "text.color": COLOURS["ink"],
    "font.size": 12.0,
    "lines.linewidth": 1.8,
    "path.simplify": True,
}
_WIDE, _NARROW = 880, 350


@dataclass(frozen=True)
class Size:
    """One of the two forms of a chart.

    Attributes:
        width: In pixels.
        is_narrow: Whether it is for a narrow window.
    """

    width: int
    is_narrow: bool = False


def draw_both(
    title: str, draw: Callable[[Axes, Size], None], height: int | Callable[[Size], int], margin: int = 0
) -> Markup:
    """A chart for a wide and for a narrow window; the page shows one of them.

    Args:
        title: What it shows, for those who cannot see it.
        margin: To the left of the axes; 0 for what its labels need.
    """
    shown = []
    for name, size in (("wide", Size(_WIDE)), ("narrow", Size(_NARROW, True))):
        tall = height if isinstance(height, int) else height(size)
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"{title}{name}"}):
            figure = Figure(figsize=(size.width / 72, tall / 72), layout=None if margin else "constrained")
            if margin:  # alike in all charts of a page, so that a step is at one place in all of them
                ends = {"left": margin / size.width, "right": 1 - 8 / size.width}
                figure.subplots_adjust(bottom=24 / tall, top=1 - 8 / tall, **ends)
            axes = figure.add_subplot()
            axes.set_facecolor("none")
            draw(axes, size)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        shown.append(f'<div class="chart {name}">{_inline(buffer.getvalue(), title)}</div>')
    return Markup("".join(shown))


def _inline(svg: str, title: str) -> str:
    """An SVG document as an element of a page, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img"><title>{escape(title)}</title>',
        svg,
        count=1,
    )
    for name, stand_in in COLOURS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    svg = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", r"font: \1\2 var(--font)", svg)
    return re.sub(r"\n\s*", "\n", svg)
