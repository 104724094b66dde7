"""How a run is doing, in a few lines."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from lightning_stability.status.fields import Event, counted, moment
from lightning_stability.status.run import Run

_SILENT_AFTER = 600.0
"""Seconds without a written byte that make nobody worry, however often a run writes."""
_SILENT_INTERVALS = 20
_TREND = 60
"""How many progress events a trend is of."""
_STEADY = 0.2


@dataclass
class Report:
    """What is said of a run.

    Attributes:
        state: `"running"`, `"finished"`, `"stopped"` (before its time), `"failed"` (an exception), `"dead"` (killed) or
            `"unknown"` (no callback that was asked for wrote when it started).
        needs_help: Whether it will not go on by itself and was not meant to end so.
        step: Optimizer steps taken, as of the newest event.
        seconds_left: The estimated time to its end, while it runs.
        lines: Names and what is said.
    """

    state: str
    needs_help: bool
    step: int | None
    seconds_left: float | None
    lines: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines) + 2
        return "\n".join(f"{name:<{width}}{printable(text)}".rstrip() for name, text in self.lines)


def look(run: Run, now: float | None = None) -> Report:
    """Say how a run is doing.

    Args:
        now: Seconds since 1970; the clock's by default.
    """
    now = time.time() if now is None else now
    written = run.last_written()
    state, said = _state(run, now, written)
    estimate = _estimate(run, now) if state == "running" else None
    step = _step(run)
    needs_help = state in ("dead", "failed") or run.stopped is not None
    report = Report(state, needs_help, step, estimate and estimate[0])
    lines = [
        ("run", str(run.folder)),
        ("state", said),
        ("progress", _progress(run, step)),
        ("estimated end", _end(run, estimate, now) if state == "running" else ""),
        ("resume", _resume(run)),
        ("loss", _newest(run, "loss")),
        ("gradient norm", _newest(run, "grad_norm")),
        ("precision", _precision(run)),
        ("loss scale", _loss_scale(run)),
        ("skipped updates", _skipped(run)),
        ("flagged inputs", _flagged(run, now)),
        ("layers", _layers(run)),
        ("incidents", str(run.incidents)),
        *(("", _incident(event)) for event in run.newest_incidents),
        ("recorded steps", _recorded(run)),
        ("missing events", _missing_events(run)),
        ("last good checkpoint", _checkpoint(run, now)),
        ("unreadable lines", str(run.unreadable) if run.unreadable else ""),
        ("last written", "never" if written is None else f"{duration(now - written)} ago"),
    ]
    report.lines = [(name, text) for name, text in lines if text]
    return report


def printable(text: str) -> str:
    """A text in one line, in which codes that a terminal would obey are escaped.

    Args:
        text: The text; events.jsonl may have come from anywhere.

    Example:
        >>> printable("two\\nlines, \\x1b[2J")
        'two lines, \\\\x1b[2J'
    """
    return "".join(
        c if c.isprintable() else " " if c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text
    )


def duration(seconds: float) -> str:
    """A time span as people say it.

    Example:
        >>> duration(4.2), duration(125), duration(7500), duration(200_000)
        ('4 s', '2 min 5 s', '2 h 5 min', '2 d 7 h')
    """
    if not math.isfinite(seconds):
        return "unknown time"
    whole = max(0, round(seconds))
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((place for place, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count) or "0 s"


def _state(run: Run, now: float, written: float | None) -> tuple[str, str]:
    started, ended = run.started, run.ended
    if ended is not None:
        state = "failed" if ended["status"] == "exception" else str(ended["status"])
        rank = f" on rank {ended['rank']}" if ended["rank"] else ""
        why = f"{ended['exception']}{rank}: {ended['why']}" if state == "failed" else ended["why"]
        return state, f"{'stopped early' if state == 'stopped' else state}: {why} ({_clock(ended['time'], now)})"
    if run.stopped is not None:
        by, why = run.stopped.get("by", "NaNEarlyStop"), run.stopped["why"]
        return "stopped", f"stopped early: {by}: {why} ({_clock(run.stopped['time'], now)})"
    if started is None:
        return "unknown", "unknown: training has not begun, or no callback of this package was asked for"
    world_size = started.get("world_size") or 1
    ranks = f", {world_size} ranks" if world_size > 1 else ""
    process = f"process {started['pid']} on {started['host']}"
    silent = now - max(written or 0.0, started["time"])
    interval = _interval(run)
    too_long = silent > max(_SILENT_AFTER, _SILENT_INTERVALS * (interval or 0.0))
    usual = f"; before, something came every {duration(interval)}" if interval else ""
    alive = run.process_is_alive()
    if alive is False:
        return "dead", f"dead: {process} is gone and has not said why; last sign of life {duration(silent)} ago"
    if alive is None and too_long:
        return "dead", (
            f"dead, as it seems: {process} has written nothing for {duration(silent)}{usual}. Only {started['host']}"
            " can tell for sure"
        )
    quiet = f", but nothing was written for {duration(silent)}{usual}" if too_long else ""
    return "running", f"running: {process}{ranks}, since {_clock(started['time'], now)}{quiet}"


def _step(run: Run) -> int | None:
    """Steps taken."""
    newest = (run.last_event, run.ended, *run.progress[-1:])  # some events tell late of an earlier step
    steps = [event["step"] for event in newest if event is not None]
    return max(steps, default=None)


def _position(run: Run, event: Event) -> float | None:
    """Which part of the whole run is done: of its steps, or of its epochs where the number of steps is unknown."""
    started = run.started or Event()
    if started.get("total_steps"):
        return float(event["step"] / started["total_steps"])
    if not started.get("max_epochs"):
        return None
    if event["event"] != "progress":
        return float(event["epoch"] / started["max_epochs"])
    if not event.get("batches") or "batch_idx" not in event:
        return None
    return float((event["epoch"] + (event["batch_idx"] + 1) / event["batches"]) / started["max_epochs"])


def _points(run: Run) -> list[tuple[float, Event]]:
    """The start and each progress event, with their positions."""
    events = [run.started, *run.progress] if run.started is not None else []
    points = [(_position(run, event), event) for event in events if event is not None]
    return [(p, event) for p, event in points if p is not None and math.isfinite(p) and math.isfinite(event["time"])]


def _estimate(run: Run, now: float) -> tuple[float, float] | None:
    """Seconds to the end, and seconds per step, at the speed of the last epoch with its validation; in the first epoch,
    at that since the start.
    """
    points, started = _points(run), run.started or Event()
    if len(points) < 2:
        return None
    total, per_epoch = started.get("total_steps"), started.get("steps_per_epoch")
    epoch = (per_epoch / total if per_epoch else math.inf) if total else 1 / started["max_epochs"]
    last, end = points[-1]
    first, begin = next((point for point in reversed(points) if last - point[0] >= epoch), points[0])
    seconds = end["time"] - begin["time"]
    if last <= first or seconds <= 0:
        return None
    left = (1 - last) * seconds / (last - first) - (now - end["time"])  # it has gone on since then
    return max(0.0, left), seconds / max(1, end["step"] - begin["step"])


def _interval(run: Run) -> float | None:
    times = [event["time"] for event in run.progress[-_TREND:] if math.isfinite(event["time"])]
    return median(b - a for a, b in pairwise(times)) if len(times) > 2 else None


def _progress(run: Run, step: int | None) -> str:
    started = run.started or Event()
    parts = []
    if step is not None:
        total = started.get("total_steps")
        parts.append(f"step {step:,} of {total:,} ({step / total:.0%})" if total else f"step {step:,}")
    epochs = _epochs(run)
    if epochs is not None:
        said = f"{epochs:.2f}".rstrip("0").rstrip(".")
        parts.append(f"{said} of {started['max_epochs']} epochs" if started.get("max_epochs") else f"epoch {said}")
    return ", ".join(parts) or "unknown"


def _epochs(run: Run) -> float | None:
    """Epochs trained."""
    newest = run.ended or (run.progress[-1] if run.progress else run.last_event)
    if newest is None or math.isnan(newest["epoch"]):
        return None
    batches = newest.get("batches") if newest is not run.ended else None
    return float(newest["epoch"] + ((newest["batch_idx"] + 1) / batches if batches and "batch_idx" in newest else 0))


def _end(run: Run, estimate: tuple[float, float] | None, now: float) -> str:
    if estimate is None:
        started = run.started or Event()
        has_last = started.get("total_steps") or started.get("max_epochs")
        return f"unknown: {'no progress was written yet' if has_last else 'the run has no last step'}"
    left, pace = estimate
    speed = f"{pace:.3g} s a step" if pace >= 1 else f"{1 / max(pace, 1e-9):.3g} steps a second"
    return f"{_clock(now + left, now)}, in {duration(left)} at {speed}, if it goes to the last step"


def _newest(run: Run, name: str) -> str:
    """The newest value of a number in the progress events, and where it is going."""
    told = [event for event in run.progress if event.get(name) is not None]
    if not told:
        return "unknown"
    newest = told[-1]
    word = trend([float(event[name]) for event in told[-_TREND:]])
    over = f"; {word} over the last {duration(newest['time'] - told[-_TREND:][0]['time'])}" if word else ""
    return f"{_number(newest[name])} (step {newest['step']:,}){over}"


def trend(values: list[float]) -> str:
    """Whether a series rises: the median of its newest third against that of its oldest third, so that outliers do not
    decide it.

    Args:
        values: Oldest first; those that are not finite do not count.

    Returns:
        `"rising"`, `"falling"`, or `"steady"` if the two differ by less than a fifth; empty for fewer than six values.

    Example:
        >>> trend([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]), trend([-1.0] * 5 + [-1.1]), trend([1.0, 2.0])
        ('rising', 'steady', '')
    """
    finite = [value for value in values if math.isfinite(value)]
    third = len(finite) // 3
    if third < 2:
        return ""
    old, new = median(finite[:third]), median(finite[-third:])
    if abs(new - old) <= _STEADY * max(abs(new), abs(old)):
        return "steady"
    return "rising" if new > old else "falling"


def _resume(run: Run) -> str:
    """Whether the steps that were taken again were the same."""
    event = run.resume
    if event is None:
        return ""
    return str(event["why"]) if event["event"] == "resume_verified" else f"not exact: {event['why']}"


def _precision(run: Run) -> str:
    change = run.precision_changed
    if change is not None:
        return f"{change['precision_to']} since step {change['step']:,}, {change['precision_from']} before"
    return "unknown" if run.started is None else str(run.started["precision"])


def _loss_scale(run: Run) -> str:
    scale = run.progress[-1].get("loss_scale") if run.progress else None
    return "" if scale is None else _number(scale)


def _skipped(run: Run) -> str:
    told = max((event.get("skipped") or 0 for event in run.progress[-1:]), default=0)  # an earlier start counted some
    ordinary, for_input = run.skipped_ordinarily, run.skipped_for_input
    said = [f"{ordinary} of these by GradScaler, which is ordinary"] if ordinary else []
    said += [f"{for_input} of these by InputCheck, for flagged inputs"] if for_input else []
    many = run.many_skips
    said += [f"{many['skipped']} of the last {counted(many['of'])} at step {many['step']:,}: too many"] if many else []
    return ", ".join([str(max(run.skipped, told)), *said])


def _flagged(run: Run, now: float) -> str:
    """How many batches InputCheck has flagged, and the newest."""
    event = run.newest_flagged
    if event is None:
        return ""
    what = "".join(f": {finding['tensor']}: {finding['reason']}" for finding in (event.get("findings") or [])[:1])
    newest = f"the newest at {_clock(event['time'], now)}, step {event['step']:,}, batch {event['batch_idx']}{what}"
    return f"{run.flagged} batch{'es' if run.flagged > 1 else ''} ({event['action']}); {newest}"


def _layers(run: Run) -> str:
    """What the check of the layers at the start warned of."""
    if not run.far_layers:
        return ""
    first = run.far_layers[0]
    what = f"the {first['side']} of {first['layer']}, std {_number(first['deviation'])}"
    said = f"far from unit scale at the start: {what}"
    if first.get("cause") is not None:
        factor = first.get("factor")
        said += f", by {first['cause']}" + (f" (x{_number(factor)})" if factor is not None else "")
    others = len(run.far_layers) - 1 + sum(found.get("others") or 0 for found in run.far_layers)
    return said + (f"; and {others} more" if others else "")


def _incident(event: Event) -> str:
    return f"{moment(event['time'], '%H:%M:%S')}  step {event['step']:,}  {what_happened(event)}"


def what_happened(event: Event) -> str:
    """An event that changes a run, in words."""
    name = event["event"]
    said = {
        "update_skipped": "update skipped by {by}: {why}",
        "gradient_norm_rising": "gradient norm {norm:.3g}, {ratio:.3g} times its usual value, most in {group}",
        "precision_changed": "precision {precision_from} -> {precision_to}: {why}",
        "many_skips": "{skipped} of the last {of} updates were skipped",
        "precision_kept": "precision {precision} kept: {why}",
        "number_restored": "a number of {parameter} ({number}) had become {was:.4g}, restored to {restored:.4g}",
        "rewound": "rewound from step {from_step} to the state of step {to_step}: {why}",
        "checkpoint_failed": "checkpoint {path} could not be written: {error}",
        "checkpoint_refused": "no checkpoint: {nonfinite_tensors} tensors are not finite",
    }.get(name)
    try:
        text = said.format_map(event) if said else ""
    except (ValueError, TypeError, OverflowError):  # what should be a number is none, such as one that was not finite
        text = ""
    if not text:
        text = f"{name}: {event['why']}" if "why" in event else name
    return text


def _recorded(run: Run) -> str:
    """How many steps IncidentReport has recorded, and where the newest is."""
    event = run.newest_recorded
    if event is None:
        return ""
    why = event.get("cause") or event.get("origin")
    return f"{run.recorded}; the newest, of step {event['step']:,}, in {event['path']}" + (f": {why}" if why else "")


def _checkpoint(run: Run, now: float) -> str:
    saved = run.last_good()
    if saved is not None:
        return f"{saved.path}, step {saved.step:,}, {duration(now - saved.time)} old"
    resumed_from = (run.started or Event()).get("resumed_from")
    if resumed_from:
        there = "" if "://" in resumed_from or os.path.exists(resumed_from) else ", which is gone"  # noqa: PTH110
        return f"none since the start; it was resumed from {resumed_from}{there}"
    others = [path for path in (run.folder / "checkpoints").glob("*.ckpt") if path.exists()]
    if others:
        newest = max(others, key=lambda path: path.stat().st_mtime)
        age = duration(now - newest.stat().st_mtime)
        return f"unknown; {newest}, {age} old, was not looked into (lightning-stability checkpoints --verify does)"
    return "none"


def _number(value: float | str) -> str:
    """A number as people read it; one that is not finite is a string."""
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _missing_events(run: Run) -> str:
    """What the figures above do not count."""
    parts = [("unreadable lines of events.jsonl", run.unreadable), ("events that could not be written", run.lost)]
    return "; ".join(f"{what}: {count}" for what, count in parts if count)


def _clock(seconds: float, now: float) -> str:
    same_day = moment(seconds, "%x") == moment(now, "%x")
    return moment(seconds, "%H:%M:%S" if same_day else "%Y-%m-%d %H:%M")
