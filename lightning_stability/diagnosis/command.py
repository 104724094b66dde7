"""`lightning-stability diagnose`: what went wrong in a recorded step."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from lightning_stability.diagnosis.errors import DiagnosisError
from lightning_stability.diagnosis.offline import diagnose
from lightning_stability.diagnosis.report import as_text


def show_diagnosis(words: list[str]) -> int:
    """Diagnose an incident; the status is 2 if that is not possible.

    Args:
        words: Those of the command line, `diagnose` first.
    """
    parser = argparse.ArgumentParser(
        "lightning-stability diagnose",
        description="Run a recorded step again, say where its first non-finite value was made, and find out why by"
        " running it with one thing changed at a time. No code from the folder is executed; the module is imported from"
        " where the run had it. Writes report.html, and repro.py, a script made of the step's calls of torch, which is"
        " run to see it fail.",
    )
    parser.add_argument("incident", type=Path, help="a folder such as lightning_logs/version_0/incidents/1-step87")
    parser.add_argument("--module", help="package.module:function, which makes the LightningModule")
    parser.add_argument(
        "--budget",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="of the search for causes (600; 0: none)",
    )
    given = parser.parse_args(words[1:])

    progress = _Progress()
    try:
        report = diagnose(given.incident, given.module, progress, given.budget)
    except DiagnosisError as error:
        print(f"lightning-stability: error: {error}", file=sys.stderr)
        return 2
    finally:
        progress.end()
    print(as_text(report))
    print(_written(given.incident, report))
    return 0


def _written(folder: Path, report: dict[str, Any]) -> str:
    """Where to read on, in a line."""
    found = next((folder / name for name in ("report.html", "report.json") if (folder / name).is_file()), None)
    if found is None:
        return ""
    beside = "; repro.py beside it fails in the same way" if (report.get("repro") or {}).get("path") else ""
    return f"report   {found}{beside}"


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r}: expected a number of seconds, 0 or more")
    return seconds


class _Progress:
    """Shows what is done: on a terminal in one line, else a line for each kind of trial."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._before = ""

    def __call__(self, message: str) -> None:
        kind = message.partition(":")[0]
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{message[:width]}", end="", file=sys.stderr, flush=True)
        elif kind != self._before:
            print(f"... {message}", file=sys.stderr, flush=True)
        self._before = kind

    def end(self) -> None:
        """Leave the line empty."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
