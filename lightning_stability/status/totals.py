"""What a whole run comes to: counted from its events, over all its starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_stability.status.fields import Event
from lightning_stability.status.report import what_happened

_QUIET = {"training_started", "training_ended", "progress", "checkpoint_saved"}
_COLOURS = {
    "update_skipped": "bad",
    "rewound": "second",
    "precision_changed": "warn",
    "incident_recorded": "bad",
    "checkpoint_saved": "muted",
    "training_started": "good",
    "resume_differs": "bad",
}
_WORDS = {
    "update_skipped": "updates skipped",
    "rewound": "rewinds",
    "precision_changed": "changes of precision",
    "incident_recorded": "recorded incidents",
    "checkpoint_saved": "checkpoints",
    "training_started": "resumes",
    "resume_differs": "resumes that were not exact",
}


@dataclass
class Totals:
    """What is counted.

    Attributes:
        first: The step at which the first start began.
        last: The newest step.
        executed: Optimizer steps that were run, those that a kill or a rewind undid included.
        skipped: Updates that were skipped.
        ordinary: Those of them by which GradScaler looks for its scale.
        rewinds: Rewinds.
        precisions: Changes of precision.
        checkpoints: Checkpoints.
        failed_checkpoints: Those that could not be written or were refused.
        resumes: Starts after the first.
        exact: Those of them that repeated what the run before the kill had done after the checkpoint.
        inexact: Those that did not.
        incidents: Steps that were recorded.
        flagged: Batches that InputCheck flagged.
        seconds: Of all starts together, as far as is known.
    """

    first: int = 0
    last: int = 0
    executed: int = 0
    skipped: int = 0
    ordinary: int = 0
    rewinds: int = 0
    precisions: int = 0
    checkpoints: int = 0
    failed_checkpoints: int = 0
    resumes: int = 0
    exact: int = 0
    inexact: int = 0
    incidents: int = 0
    flagged: int = 0
    seconds: float = 0.0

    @property
    def kept(self) -> float | None:
        """Which part of the steps that were run is in the weights; None if none was run."""
        return (self.last - self.first) / self.executed if self.executed > 0 else None


def count(events: list[Event]) -> Totals:
    """Count a run's events.

    Args:
        events: Oldest first, without the copies of a start at the head of a new file.

    Example:
        >>> from lightning_stability.status.fields import typed
        >>> start, end = {"event": "training_started", "step": 0}, {"event": "training_ended", "step": 10}
        >>> rewound = {"event": "rewound", "step": 4, "from_step": 8, "to_step": 4}
        >>> found = count([typed(event) for event in (start, rewound, end)])
        >>> found.executed, round(found.kept, 2)
        (14, 0.71)
    """
    found, reached, started, began, newest = Totals(), 0, False, None, None
    for event in events:
        name, step = event["event"], event["step"]
        if name == "training_started":
            found.seconds += _between(began, newest)
            found.resumes += started
            found.first = found.first if started else step
            started, reached, began = True, step, event
        elif name == "rewound":
            found.rewinds += 1
            found.executed += max(0, _whole(event.get("from_step"), step) - reached)
            reached = _whole(event.get("to_step"), step)
        elif step > reached:
            found.executed += step - reached
            reached = step
        _add(found, event)
        newest = event
        found.last = reached
    found.seconds += _between(began, newest)
    return found


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise


def _add(found: Totals, event: Event) -> None:
    name = event["event"]
    found.skipped += name == "update_skipped"
    found.ordinary += name == "update_skipped" and bool(event.get("ordinary"))
    found.precisions += name == "precision_changed"
    found.checkpoints += name == "checkpoint_saved"
    found.failed_checkpoints += name in ("checkpoint_failed", "checkpoint_refused")
    found.incidents += name == "incident_recorded"
    found.exact += name == "resume_verified"
    found.inexact += name == "resume_differs"
    found.flagged += name == "input_flagged"


def _between(began: Event | None, newest: Event | None) -> float:
    if began is None or newest is None:
        return 0.0
    return float(max(0.0, newest.get("time", 0.0) - began.get("time", 0.0)))


@dataclass
class Curve:
    """A number over the steps of a run; a gap where a step follows that is not later.

    Attributes:
        steps: The steps.
        values: Theirs.
    """

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: float, value: float) -> None:
        """A point."""
        if self.steps and step <= self.steps[-1]:
            self.steps.append(self.steps[-1])
            self.values.append(float("nan"))
        self.steps.append(step)
        self.values.append(value)


def marks(events: list[Event]) -> list[tuple[str, str, list[int]]]:
    """What happened and at which steps, by kind: its words, its colour, the steps."""
    starts = 0
    found: dict[str, list[int]] = {}
    for event in events:
        name = event["event"]
        starts += name == "training_started"
        if name in _WORDS and not event.get("ordinary") and (name != "training_started" or starts > 1):
            found.setdefault(name, []).append(event["step"])
    return [(_WORDS[name], _COLOURS[name], steps) for name, steps in found.items()]


def told(events: list[Event]) -> list[Event]:
    """The events that a reader of the run looks for; neither progress nor checkpoints."""
    return [event for event in events if event["event"] not in _QUIET and not event.get("ordinary")]


def words_of(event: Event) -> str:
    """An event in words."""
    name = event["event"]
    if name == "incident_recorded":
        return f"step recorded: {event.get('cause') or event.get('origin') or event.get('what')}"
    if name == "training_stopped":
        return f"stopped by {event.get('by', 'NaNEarlyStop')}: {event.get('why')}"
    if name == "input_flagged":
        findings = [finding for finding in event.get("findings") or [] if isinstance(finding, dict)]
        said = "; ".join(f"{found.get('tensor')}: {found.get('reason')}" for found in findings[:2])
        return f"batch flagged ({event.get('action')}): {said}"
    return what_happened(event)
