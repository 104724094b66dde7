"""`lightning-stability status`: once, or again and again."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from lightning_stability.status.live import is_live, live_view
from lightning_stability.status.report import Report, look
from lightning_stability.status.run import NoRunError, Run, find_run

_SECONDS = 2.0
_CLEAR = "\033[H\033[2J"


def show_status(words: list[str]) -> int:
    """Say how a run is doing; the status is 1 if it died, failed or was ended by NaNEarlyStop, 2 if there is none.

    Args:
        words: Those of the command line, `status` first.
    """
    parser = argparse.ArgumentParser(
        "lightning-stability status",
        description="Say how a run is doing, from its events.jsonl. The status is 1 if it died, failed or"
        " was ended by NaNEarlyStop, 2 if there is no run, and 0 otherwise.",
    )
    parser.add_argument("folder", type=Path, help="a run's log folder, such as lightning_logs/version_0, or one above")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="look again every two seconds, until the run has ended or Ctrl-C; on a terminal it is drawn in its place,"
        " with colours and curves where `rich` is installed",
    )
    given = parser.parse_args(words[1:])
    try:
        report = _follow(given.folder, given.watch)
    except NoRunError as error:
        print(f"lightning-stability: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor shall the interpreter flush into it
        return 0
    return int(report is not None and report.needs_help)


def _follow(folder: Path, watch: bool) -> Report | None:
    """Say it, again and again if asked for; None if Ctrl-C came before the first time."""
    report = None
    try:
        with live_view() if watch and is_live() else nullcontext(_printer()) as show:
            while report is None or (watch and report.state in ("running", "unknown")):
                if report is not None:
                    time.sleep(_SECONDS)
                run = Run(find_run(folder))  # the newest one: it may have been started again
                report = look(run)
                show(run, report)
    except KeyboardInterrupt:
        print()
    return report


def _printer() -> Callable[[Run, Report], None]:
    """Prints a report where it says something new; on a terminal each time, in place of the one before."""
    before: Report | None = None
    redraws = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def show(_: Run, report: Report) -> None:
        nonlocal before
        if redraws:
            print((_CLEAR if before else "") + str(report), flush=True)
        elif before is None or (report.step, report.state) != (before.step, before.state):
            print(("\n" if before else "") + str(report), flush=True)
        before = report

    return show
