"""What `lightning-stability status --watch` draws on a terminal, again and again, with `rich`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning_stability.status.report import Report, printable
from lightning_stability.status.run import Run

if TYPE_CHECKING:  # an extra of the package
    from rich.console import Console, Group

_COLOURS = {"running": "green", "finished": "green", "failed": "red", "dead": "red"}
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 60


def is_live() -> bool:
    """Whether the output is a terminal that can be drawn on, and `rich` is installed."""
    draws = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if not draws or "utf" not in (sys.stdout.encoding or "").lower():
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def live_view(console: Console | None = None) -> Iterator[Callable[[Run, Report], None]]:
    """A view in its place on the terminal, which is drawn anew for each report; the last one stays.

    Args:
        console: Where it is drawn; the standard output by default.
    """
    from rich.live import Live

    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda run, report: live.update(_view(run, report), refresh=True)


def _view(run: Run, report: Report) -> Group:
    """The report's lines, with the state in its colour, a bar for the progress, and two curves."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    colour = _COLOURS.get(report.state, "yellow")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in report.lines:
        table.add_row(name, Text(printable(text), style=colour if name == "state" else ""))
    drawn = Table.grid(padding=(0, 2))
    drawn.add_column(style="dim", no_wrap=True)
    total = run.started.get("total_steps") if run.started is not None else None
    if total and report.step is not None:
        drawn.add_row("steps", ProgressBar(total, min(report.step, total), width=_CURVE_WIDTH, complete_style=colour))
    for name, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
        values = [float(event[key]) for event in run.progress if event.get(key) is not None]
        if values:
            drawn.add_row(name, curve(values))
    return Group(table, "", drawn) if drawn.row_count else Group(table)


def curve(values: list[float]) -> str:
    """The newest values as a row of bars, from the smallest to the largest; `x` is one that is not finite.

    Args:
        values: Oldest first.

    Example:
        >>> curve([1.0, 8.0, float("nan"), 4.5])
        '▁█x▄'
    """
    newest = values[-_CURVE_WIDTH:]
    finite = [value for value in newest if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    steps = len(_BARS) - 1
    # (halved: the largest less the smallest of two huge numbers is infinite)
    spread = high / 2 - low / 2 or 1.0
    return "".join(
        _BARS[int(steps * ((value / 2 - low / 2) / spread))] if math.isfinite(value) else "x" for value in newest
    )
