"""How a run is doing, in a few lines."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from lightning_stability.status import trend
from lightning_stability.status.files import board_files
from lightning_stability.status.run import Run

_SILENT_AFTER = 600.0
"""Seconds without a written byte that make nobody worry, however often a run logs."""
_SILENT_INTERVALS = 20
_MONITOR = "GradNormMonitor"
_NORM = re.compile(r"grad_norm/(optimizer_\d+/)?total")
_NOT_TRAINING = ("val", "test", "valid", "eval")


@dataclass
class Report:
    """What is said of a run.

    Attributes:
        state: `"running"`, `"finished"`, `"stopped"` (before its time), `"failed"` (an exception), `"dead"` (killed) or
            `"unknown"` (no callback that was asked for wrote when it started).
        needs_help: Whether it will not go on by itself and was not meant to end so.
        step: Optimizer steps taken, as far as they were logged.
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
        return "\n".join(f"{name:<{width}}{text}".rstrip() for name, text in self.lines)


def look(run: Run, now: float | None = None) -> Report:
    """Say how a run is doing, from what `run.update` has read.

    Args:
        run: The run.
        now: Seconds since 1970; the clock's by default.
    """
    now = time.time() if now is None else now
    written = run.last_written()
    state, said = _state(run, now, written)
    step = _step(run)
    pace = _seconds_per_step(run, written) if state == "running" else None
    total = (run.started or {}).get("total_steps")
    left = (total - step) * pace if total is not None and step is not None and pace is not None else None
    report = Report(state, state in ("dead", "failed") or run.stopped is not None, step, left)
    lines = [
        ("run", str(run.folder)),
        ("state", said),
        ("progress", _progress(run, step)),
        ("estimated end", _end(left, pace, total, now) if state == "running" else ""),
        ("loss", _newest(run, loss_tag(run.series))),
        ("validation", _validation(run)),
        ("gradient norm", _gradient_norm(run)),
        ("precision", _precision(run)),
        ("loss scale", _loss_scale(run)),
        ("skipped updates", _skipped(run)),
        ("flagged inputs", _flagged(run, now)),
        ("layers", _layers(run)),
        ("incidents", str(run.incidents)),
        *(("", _incident(event)) for event in run.newest_incidents),
        ("missing events", _missing_events(run)),
        ("last good checkpoint", _checkpoint(run, now)),
        ("last written", "never" if written is None else f"{duration(now - written)} ago"),
    ]
    report.lines = [(name, text) for name, text in lines if text]
    return report


def loss_tag(tags: Sequence[str] | dict[str, Any]) -> str | None:
    """The key under which the training loss is logged, as far as names tell; the loss of a step goes first.

    Args:
        tags: All keys.

    Example:
        >>> loss_tag(["val_loss", "train_loss_epoch", "train_loss_step", "loss_scale"])
        'train_loss_step'
    """
    found = [tag for tag in tags if "loss" in tag.lower() and tag != "loss_scale" and not _is_validation(tag)]
    return min(found, key=lambda tag: (not tag.endswith("_step"), tag.endswith("_epoch"), len(tag), tag), default=None)


def duration(seconds: float) -> str:
    """A time span as people say it.

    Args:
        seconds: Its length.

    Example:
        >>> duration(4.2), duration(125), duration(7500), duration(200_000)
        ('4 s', '2 min 5 s', '2 h 5 min', '2 d 7 h')
    """
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
        return "stopped", f"stopped early: NaNEarlyStop: {run.stopped['why']} ({_clock(run.stopped['time'], now)})"
    if started is None:
        return "unknown", "unknown: training has not begun, or no callback of this package was asked for"
    ranks = f", {started['world_size']} ranks" if started["world_size"] > 1 else ""
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
    """Steps taken: Lightning logs a step under the number of those before it."""
    steps = [event["step"] for event in (run.last_event, run.ended) if event is not None]
    tags = [tag for tag in ("grad_norm/total", loss_tag(run.series)) if tag in run.series]
    steps += [run.series[tag][-1].step + 1 for tag in tags if tag is not None]
    total = (run.started or {}).get("total_steps")
    step = max(steps, default=None)
    return step if step is None or total is None or run.ended is not None else min(step, total)


def _seconds_per_step(run: Run, written: float | None) -> float | None:
    """Over the last epoch, with its validation; before that has passed, since the start."""
    started = run.started
    if started is None:
        return None
    points = _pace_points(run)
    if not points:  # no logger that says when
        step = _step(run) or 0
        points = [(step, written)] if written is not None else []
    last_step, last_time = points[-1] if points else (started["step"], started["time"])
    epoch = started.get("steps_per_epoch") or math.inf
    first_step, first_time = next(
        (point for point in reversed(points) if last_step - point[0] >= epoch), (started["step"], started["time"])
    )
    if last_step <= first_step or last_time <= first_time:
        return None
    return float((last_time - first_time) / (last_step - first_step))


def _pace_points(run: Run) -> list[tuple[int, float]]:
    """Steps taken and when, from the key that is logged most often."""
    tags = [tag for tag in ("grad_norm/total", loss_tag(run.series)) if tag in run.series]
    series = max((run.series[tag] for tag in tags if tag is not None), key=len, default=[])
    return [(point.step + 1, point.time) for point in series if point.time is not None]


def _interval(run: Run) -> float | None:
    times = [moment for _, moment in _pace_points(run)]
    return median(b - a for a, b in pairwise(times)) if len(times) > 2 else None


def _progress(run: Run, step: int | None) -> str:
    started = run.started or {}
    parts = []
    if step is not None:
        total = started.get("total_steps")
        parts.append(f"step {step:,} of {total:,} ({step / total:.0%})" if total else f"step {step:,}")
    epoch = _epoch(run)
    if epoch is not None:
        per_epoch = started.get("steps_per_epoch")
        trained = min(max(epoch, step / per_epoch), epoch + 1) if per_epoch and step is not None else epoch
        said = f"{trained:.2f}".rstrip("0").rstrip(".")
        parts.append(f"{said} of {started['max_epochs']} epochs" if started.get("max_epochs") else f"epoch {said}")
    return ", ".join(parts)


def _epoch(run: Run) -> int | None:
    """Epochs that are over."""
    if run.ended is not None:
        return int(run.ended["epoch"])
    epochs = [run.last_event["epoch"]] if run.last_event is not None else []
    if "epoch" in run.series:
        epochs.append(int(run.series["epoch"][-1].value))
    return max(epochs, default=None)


def _end(left: float | None, pace: float | None, total: int | None, now: float) -> str:
    if left is None or pace is None:
        return "unknown: no step was logged yet" if total is not None else "unknown: the run has no last step"
    speed = f"{pace:.3g} s a step" if pace >= 1 else f"{1 / pace:.3g} steps a second"
    return f"{_clock(now + left, now)}, in {duration(left)} at {speed}, if it goes to the last step"


def _newest(run: Run, tag: str | None) -> str:
    if tag is None:
        return "not logged"
    point = run.series[tag][-1]
    return f"{point.value:.4g} ({tag}, step {point.step + 1:,})"


def _validation(run: Run) -> str:
    """The newest metrics of the validation, at most four."""
    tags = sorted(tag for tag in run.series if tag.lower().startswith(("val_", "val/")))
    return ", ".join(f"{tag} {run.series[tag][-1].value:.4g}" for tag in tags[:4])


def _gradient_norm(run: Run) -> str:
    """The newest norm and its trend, of each optimizer if there are several."""
    tags = sorted(tag for tag in run.series if _NORM.fullmatch(tag))
    return ", ".join(_norm_and_trend(run, tag) for tag in tags) or f"not logged ({_why_no_norm(run)})"


def _norm_and_trend(run: Run, tag: str) -> str:
    values = [point.value for point in run.series[tag]]
    factor = trend.trend(values)
    counted = min(len(values), trend.WINDOW)
    said = f"; {trend.in_words(factor)} over the last {counted} logged" if factor is not None else ""
    optimizer = tag.split("/")[1]
    return f"{'' if optimizer == 'total' else f'{optimizer} '}{values[-1]:.4g}{said}"


def _why_no_norm(run: Run) -> str:
    started = run.started
    may_be_unasked = started is None or _MONITOR in started.get("unasked", [])
    if may_be_unasked and not board_files(run.folder):
        return f"{_MONITOR} does; unless it is asked for, only to a TensorBoard file of the run's, and here is none"
    if started is None or _MONITOR not in started["callbacks"]:
        return f"{_MONITOR} does"
    return f"{_MONITOR} has not yet: as a rule it does every log_every_n_steps steps"


def _precision(run: Run) -> str:
    change = run.precision_changed
    if change is not None:
        return f"{change['precision_to']} since step {change['step']:,}, {change['precision_from']} before"
    if run.started is not None:
        return str(run.started["precision"])
    bits = run.series.get("precision_bits")
    return f"{bits[-1].value:.0f} bits" if bits else ""


def _loss_scale(run: Run) -> str:
    now_in = run.precision_changed["precision_to"] if run.precision_changed else (run.started or {}).get("precision")
    points = run.series.get("loss_scale")
    if not points or (now_in is not None and now_in != "16-mixed"):
        return ""
    return f"{points[-1].value:g}"


def _skipped(run: Run) -> str:
    logged = run.series.get("skipped_updates")
    total = max(run.skipped, int(logged[-1].value) if logged else 0)  # an earlier start of the run counted some
    ordinary, for_input = run.skipped_ordinarily, run.skipped_for_input
    said = [f"{ordinary} of these by GradScaler, which is ordinary"] if ordinary else []
    said += [f"{for_input} of these by InputCheck, for flagged inputs"] if for_input else []
    return ", ".join([str(total), *said])


def _flagged(run: Run, now: float) -> str:
    """How many batches InputCheck has flagged, and the newest."""
    event = run.newest_flagged
    if event is None:
        return ""
    what = "".join(f": {finding['tensor']}: {finding['reason']}" for finding in event["findings"][:1])
    newest = f"the newest at {_clock(event['time'], now)}, step {event['step']:,}, batch {event['batch_idx']}{what}"
    return f"{run.flagged} batch{'es' if run.flagged > 1 else ''} ({event['action']}); {newest}"


def _layers(run: Run) -> str:
    """What was warned of when the layers were looked at, at the start."""
    if not run.far_layers:
        return ""
    first = run.far_layers[0]
    what = f"the {first['side']} of {first['layer']}, deviation {_number(first['deviation'])}"
    said = f"far from unit scale at the start: {what}"
    if first["cause"] is not None:
        factor = first["factor"]
        said += f", by {first['cause']}" + (f" (x{_number(factor)})" if factor is not None else "")
    others = len(run.far_layers) - 1 + sum(found["others"] for found in run.far_layers)
    return said + (f"; and {others} more" if others else "")


def _incident(event: dict[str, Any]) -> str:
    name = event["event"]
    said = {
        "update_skipped": "update skipped by {by}: {why}",
        "gradient_norm_rising": "gradient norm {norm:.3g}, {ratio:.3g} times its usual value, most in {group}",
        "precision_changed": "precision {precision_from} -> {precision_to}: {why}",
        "precision_kept": "precision {precision} kept: {why}",
        "checkpoint_failed": "checkpoint {path} could not be written: {error}",
        "checkpoint_refused": "no checkpoint: {nonfinite_tensors} tensors are not finite",
    }.get(name)
    try:
        text = said.format(**event) if said else ""
    except (KeyError, ValueError, IndexError):  # a number that was not finite is a string
        text = ""
    if not text:
        text = f"{name}: {event['why']}" if "why" in event else name
    return f"{datetime.fromtimestamp(event['time']):%H:%M:%S}  step {event['step']:,}  {text}"


def _checkpoint(run: Run, now: float) -> str:
    saved = run.last_good()
    if saved is not None:
        return f"{saved.path}, step {saved.step:,}, {duration(now - saved.time)} old"
    resumed_from = (run.started or {}).get("resumed_from")
    if resumed_from:
        there = "" if "://" in resumed_from or Path(resumed_from).exists() else ", which is gone"
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


def _clock(moment: float, now: float) -> str:
    day = datetime.fromtimestamp(moment).date() == datetime.fromtimestamp(now).date()
    return f"{datetime.fromtimestamp(moment):{'%H:%M:%S' if day else '%Y-%m-%d %H:%M'}}"


def _is_validation(tag: str) -> bool:
    return tag.lower().lstrip("_").startswith(_NOT_TRAINING)
