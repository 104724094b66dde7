"""`lightning-stability report`: runs as one page, from their events alone."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning_stability.atomic import replace_file
from lightning_stability.pages import what_is_missing
from lightning_stability.pages.numbers import as_number, is_wide_ranging
from lightning_stability.status.fields import Event, moment, read_run
from lightning_stability.status.report import duration, look
from lightning_stability.status.run import NoRunError, Run, event_files, find_run
from lightning_stability.status.totals import Curve, Totals, count, marks, told, words_of

_COLOURS = ("accent", "second", "third", "warn", "good", "bad")
_MOST_EVENTS = 200
_CURVES = (
    ("Loss", "loss"),
    ("Gradient norm, before clipping", "grad_norm"),
    ("Learning rate", "learning_rate"),
    ("Loss scale", "loss_scale"),
)
_LOOKS = {"finished": "good", "running": "good", "stopped": "warn", "failed": "", "dead": "", "unknown": "warn"}


@dataclass
class Shown:
    """A run, as the page shows it.

    Attributes:
        name: Short, and another one than those of the other runs.
        folder: Its log folder.
        events: Oldest first, without copies of a start.
        state: Such as `"finished"`.
        said: The state in a sentence.
        totals: What it comes to.
        colour: Of its curves, where there are several runs.
    """

    name: str
    folder: Path
    events: list[Event]
    state: str
    said: str
    totals: Totals
    colour: str


def show_report(words: list[str]) -> int:
    """Write the page of one or several runs; the status is 2 if there is no run, or the page cannot be written.

    Args:
        words: Those of the command line, `report` first.
    """
    parser = argparse.ArgumentParser(
        "lightning-stability report",
        description="Write one self-contained HTML page about a run, or about several beside each other, from their"
        " events.jsonl: curves with what happened, totals, and links to incidents' reports.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_DIR", help="such as lightning_logs/version_0")
    parser.add_argument("-o", "--output", type=Path, default=Path("run.html"), help="the page (run.html)")
    given = parser.parse_args(words[1:])
    missing = what_is_missing()
    if missing is not None:
        print(f"lightning-stability: error: a page cannot be made: {missing}", file=sys.stderr)
        return 2
    try:
        _write([find_run(folder) for folder in given.folders], given.output)
    except (NoRunError, OSError) as error:
        print(f"lightning-stability: error: {error}", file=sys.stderr)
        return 2
    print(given.output)
    return 0


def leave_page(folder: str | None) -> str:
    """Write a run's page into its folder; return what to say of it."""
    if folder is None or not event_files(Path(folder)):
        return "There is no page about the run, for it has no events.jsonl."
    missing = what_is_missing()
    if missing is not None:
        return f"There is no page about the run: {missing}"
    target = Path(folder) / "run.html"
    _write([Path(folder)], target)
    return f"A page about this run, to open in a browser: {target}"


def _write(folders: list[Path], target: Path) -> None:
    text = page_of(folders, target.resolve().parent)
    replace_file(target, lambda file: file.write(text.encode(errors="backslashreplace")))


def page_of(folders: list[Path], beside: Path) -> str:
    """The page of some runs.

    Args:
        beside: The folder that the page will be in: links start there.
    """
    from lightning_stability.pages.page import render  # (matplotlib and jinja2 are no dependencies of the package)

    names = _names(folders)
    runs = [_look_at(*one) for one in zip(names, folders, [_COLOURS[i % 6] for i in range(len(names))], strict=True)]
    return render(
        "run.html",
        version=metadata.version("lightning-stability"),
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        heading=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=[_section(run, beside) for run in runs],
        curves=_curves(runs),
        legend=_legend(runs),
        rows=_table(runs) if len(runs) > 1 else [],
    )


def _legend(runs: list[Shown]) -> list[tuple[str, str]]:
    """What the colours mean: runs, or, of one run, what happened."""
    if len(runs) > 1:
        return [(run.name, run.colour) for run in runs]
    return [(f"{words} ({len(steps):,})", colour) for words, colour, steps in marks(runs[0].events)]


def _names(folders: list[Path]) -> list[str]:
    """The last part of each path, and as much before it as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in (1, 2, 3):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _look_at(name: str, folder: Path, colour: str) -> Shown:
    events, _ = read_run(folder)
    starts = [event for event in events if event["event"] == "training_started"]
    first = next((event for event in starts if not event.get("repeated")), None)
    events = [event for event in events if not event.get("repeated") or first is None]
    report = look(Run(folder))
    said = next((text for line, text in report.lines if line == "state"), report.state)
    return Shown(name, folder, events, report.state, said, count(events), colour)


def _section(run: Shown, beside: Path) -> dict[str, Any]:
    """What the page says of one run."""
    listed = told(run.events)
    checkpoints = [event for event in run.events if event["event"] == "checkpoint_saved"]
    return {
        "name": run.name,
        "colour": run.colour,
        "state": run.state,
        "said": f"{run.said[:1].upper()}{run.said[1:]}",
        "look": _LOOKS.get(run.state, ""),
        "sentence": _sentence(run.totals),
        "totals": _totals(run),
        "events": [_row(event, run, beside) for event in listed[-_MOST_EVENTS:]],
        "left_out": max(0, len(listed) - _MOST_EVENTS),
        "checkpoints": [(f"{event['step']:,}", _clock(event), str(event.get("path"))) for event in checkpoints[-50:]],
        "facts": _facts(run),
    }


def _sentence(totals: Totals) -> str:
    """What the run comes to."""
    said = [f"{_many(totals.skipped, 'update')} of {totals.executed:,} skipped"]
    if totals.ordinary:
        said[0] += f" ({totals.ordinary} by GradScaler, which is ordinary)"
    said.append(_many(totals.rewinds, "rewind"))
    proof = f" ({_proof(totals)})" if totals.exact or totals.inexact else ""
    said.append(_many(totals.resumes, "resume") + proof)
    if totals.kept is not None:
        said.append(f"{_percent(totals.kept)} of the steps kept")
    return f"{', '.join(said)}."


def _proof(totals: Totals) -> str:
    """What the fingerprints of the steps before said of the resumes."""
    if totals.exact == totals.resumes:
        return "all exact" if totals.resumes > 1 else "exact"
    told = [(totals.exact, "exact"), (totals.inexact, "not exact")]
    return ", ".join(f"{number} {word}" for number, word in told if number)


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _percent(part: float) -> str:
    """Never 100 % unless it is all."""
    text = f"{100 * part:.2f}".rstrip("0").rstrip(".")
    return "99.99 %" if text == "100" and part < 1 else f"{text} %"


def _totals(run: Shown) -> list[tuple[str, str]]:
    totals = run.totals
    started = _started(run)
    of = f" of {started['total_steps']:,}" if isinstance(started.get("total_steps"), int) else ""
    told = [
        ("steps" + of, f"{totals.last:,}"),
        ("updates skipped", f"{totals.skipped:,}"),
        ("rewinds", f"{totals.rewinds:,}"),
        ("resumes", f"{totals.resumes:,}"),
        ("of the steps kept", "unknown" if totals.kept is None else _percent(totals.kept)),
        ("checkpoints", f"{totals.checkpoints:,}"),
        ("recorded incidents", f"{totals.incidents:,}"),
        ("trained", duration(totals.seconds)),
    ]
    more = [
        ("flagged batches", totals.flagged),
        ("changes of precision", totals.precisions),
        ("checkpoints not written", totals.failed_checkpoints),
    ]
    return told + [(name, f"{number:,}") for name, number in more if number]


def _started(run: Shown) -> Event:
    starts = [event for event in run.events if event["event"] == "training_started"]
    return starts[-1] if starts else Event()


def _facts(run: Shown) -> list[tuple[str, str]]:
    started = _started(run)
    facts = [
        ("Folder", str(run.folder)),
        ("Started", _clock(started) if started else ""),
        ("Host", f"{started['host']}, process {started.get('pid')}" if started.get("host") else ""),
        ("Ranks", str(started.get("world_size") or "")),
        ("Precision", str(started.get("precision") or "")),
        ("Epochs", str(started.get("max_epochs") or "")),
        ("Resumed from", str(started.get("resumed_from") or "")),
        ("Callbacks", ", ".join(map(str, started.get("callbacks") or []))),
    ]
    return [(name, text) for name, text in facts if text]


def _row(event: Event, run: Shown, beside: Path) -> dict[str, Any]:
    link = _link(event, run.folder, beside) if event["event"] == "incident_recorded" else ""
    name = event["event"].replace("_", " ")
    return {"time": _clock(event), "step": event["step"], "name": name, "text": words_of(event), "link": link}


def _link(event: Event, folder: Path, beside: Path) -> str:
    """From the page to an incident's report, where that is; the run's folder may have been moved."""
    told = Path(str(event.get("path")))
    for place in (told, folder / "incidents" / told.name):
        page = place / "report.html"
        if os.path.isfile(page):  # noqa: PTH113 (no path at all, or one too long, is false here and no error)
            return quote(os.fsencode(Path(os.path.relpath(page.resolve(), beside)).as_posix()))
    return ""


def _clock(event: Event) -> str:
    return moment(event["time"], "%Y-%m-%d %H:%M:%S")


def _curves(runs: list[Shown]) -> list[tuple[str, Any]]:
    """The charts of all runs together; with one run, what happened is marked in them."""
    from lightning_stability.pages.charts import Mark, Series, curves

    happened = [Mark(step, colour) for _, colour, steps in marks(runs[0].events) for step in steps]
    steps = [event["step"] for run in runs for event in run.events]
    span, made = (min(steps, default=0), max(steps, default=0)), []
    for title, key in (*_CURVES, ("Seconds a step", "")):
        told = [(run, _curve(run, key) if key else _pace(run)) for run in runs]
        told = [(run, curve) for run, curve in told if curve.steps]
        if not told:
            continue
        several = len(runs) > 1
        series = [Series(c.steps, c.values, run.colour) for run, c in told]
        log = is_wide_ranging([value for _, curve in told for value in curve.values])
        made.append((title, curves(title, series, [] if several else happened, log, span)))
    return made


def _curve(run: Shown, key: str) -> Curve:
    curve = Curve()
    for event in run.events:
        if event["event"] == "progress" and event.get(key) is not None:
            curve.add(event["step"], as_number(event[key]))
    return curve


def _pace(run: Shown) -> Curve:
    """Seconds a step, between two progress events of one start."""
    curve = Curve()
    timed = [event for event in run.events if event["event"] in ("progress", "training_started")]
    for before, event in pairwise(timed):
        steps = event["step"] - before["step"]
        if event["event"] == "progress" and steps > 0:
            curve.add(event["step"], (event["time"] - before["time"]) / steps)
    return curve


def _table(runs: list[Shown]) -> list[tuple[str, list[str]]]:
    """Runs beside each other: a row for each total."""
    totals = [dict(_totals(run)) for run in runs]
    steps = [("steps", [f"{run.totals.last:,}" for run in runs])]
    names = list(dict.fromkeys(name for one in totals for name in one if not name.startswith("steps")))
    last = [("newest loss", [_newest(run, "loss") for run in runs])]
    return [*steps, *((name, [one.get(name, "0") for one in totals]) for name in names), *last]


def _newest(run: Shown, key: str) -> str:
    values = [event[key] for event in run.events if event["event"] == "progress" and event.get(key) is not None]
    return f"{as_number(values[-1]):.4g}" if values else "unknown"
