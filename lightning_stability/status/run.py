"""One run's folder: which it is, and what its events say."""

from __future__ import annotations

import math
import os
import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_stability.events import FILE_NAME, PREVIOUS_FILE_NAME
from lightning_stability.processes import is_alive
from lightning_stability.status.fields import Event, read_run

_DEPTH = 4
_NO_INCIDENTS = (
    *("training_started", "training_ended", "training_stopped", "checkpoint_saved", "progress"),
    *("input_scales", "input_flagged", "incident_recorded", "resume_verified"),  # they have lines of their own
)
_INPUT_CHECK = "InputCheck"
_SAME_START = 2.0
"""Seconds between what two ranks write of one start."""


class NoRunError(Exception):
    """A folder is no run, and there is none below it. None of Lightning's own, whose import takes seconds."""


class Saved(NamedTuple):
    """A checkpoint that an event names."""

    path: str
    step: int
    time: float


class Run:
    """What the events of a run say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: Event | None = None
        self.ended: Event | None = None
        self.stopped: Event | None = None
        """The `training_stopped` of NaNEarlyStop."""
        self.last_event: Event | None = None
        self.progress: list[Event] = []
        """Since the newest start."""
        self.precision_changed: Event | None = None
        self.skipped = self.skipped_ordinarily = self.skipped_for_input = 0
        """Skipped updates; those of them by which GradScaler looks for its scale, and those of flagged batches."""
        self.many_skips: Event | None = None
        self.flagged = 0
        self.newest_flagged: Event | None = None
        self.far_layers: list[Event] = []
        """What InputCheck's check of the layers warned of."""
        self.resume: Event | None = None
        """Whether the newest start took the same steps as the run before it: `resume_verified` or `resume_differs`."""
        self.recorded = 0
        self.newest_recorded: Event | None = None
        """The `incident_recorded` of IncidentReport."""
        self.lost = 0
        """Events that could not be written."""
        self.incidents = 0
        self.newest_incidents: deque[Event] = deque(maxlen=3)
        self.saved: deque[Saved] = deque(maxlen=100)
        events, self.unreadable = read_run(folder)
        """The second: lines that are no events."""
        for event in events:
            if not event.get("repeated") or self.started is None:
                self._add(event)

    def last_written(self) -> float | None:
        """When its events were last written, in seconds since 1970."""
        return max((_modified(path) for path in event_files(self.folder)), default=None)

    def last_good(self) -> Saved | None:
        """The newest checkpoint that was found finite before it was written, and is still there."""
        for saved in reversed(self.saved):
            for path in (Path(saved.path), self.folder / "checkpoints" / Path(saved.path).name):
                if os.path.exists(path):  # noqa: PTH110 (no path at all, or one too long, is false here and no error)
                    return saved._replace(path=str(path))
            if "://" in saved.path:  # not this machine's to look at
                return saved
        return None

    def process_is_alive(self) -> bool | None:
        """Whether the process that trains is there; None if that cannot be known from here."""
        if self.started is None or self.started["host"] != socket.gethostname():
            return None
        pid, began = self.started.get("pid"), self.started["time"]
        if not pid or pid >= 2**31 or math.isnan(began):
            return None
        return is_alive(pid, started_before=began)

    def _add(self, event: Event) -> None:
        self.last_event = event
        self.lost += event.get("lost", 0)
        name = event["event"]
        if name == "training_started":
            if self.ended is not None and not _is_end_of(self.ended, event):
                self.ended = None
            self.started, self.stopped, self.precision_changed, self.many_skips = event, None, None, None
            self.progress, self.resume = [], None
        elif name == "training_ended":
            self.ended = self.ended or event  # what the first rank died of, not what followed from it
        elif name == "training_stopped":
            self.stopped = event
            if event.get("checkpoint"):
                self.saved.append(Saved(event["checkpoint"], event["step"], event["time"]))
        elif name == "progress":
            self.progress.append(event)
        elif name == "checkpoint_saved":
            if event.get("path"):
                self.saved.append(Saved(event["path"], event["step"], event["time"]))
        elif name == "update_skipped":
            self.skipped += 1
            self.skipped_ordinarily += bool(event.get("ordinary"))
            self.skipped_for_input += event.get("by") == _INPUT_CHECK
        elif name == "many_skips":
            self.many_skips = event
        elif name == "input_flagged":
            self.flagged += 1
            self.newest_flagged = event
        elif name == "input_scales":
            self.far_layers = event.get("far_from_unit_scale") or []
        elif name == "incident_recorded":
            self.recorded += 1
            self.newest_recorded = event
        elif name in ("resume_verified", "resume_differs"):
            self.resume = event
        elif name == "precision_changed":
            self.precision_changed = event
        if name not in _NO_INCIDENTS and not event.get("ordinary") and event.get("by") != _INPUT_CHECK:
            self.incidents += 1
            self.newest_incidents.append(event)


def _is_end_of(ended: Event, started: Event) -> bool:
    """Whether another rank had died when rank 0 wrote that training starts; a new start takes longer to come."""
    return bool(ended["rank"]) and abs(started["time"] - ended["time"]) < _SAME_START


def find_run(path: Path) -> Path:
    """Return the run's folder: this one, or the one below it whose events were written last.

    Raises:
        NoRunError: If there is none.
    """
    if path.is_file() and path in event_files(path.parent):
        return path.parent
    if not path.is_dir():
        if path.exists():
            raise NoRunError(f"{path} is a file and no events.jsonl; expected the folder of a run.")
        raise NoRunError(f"There is no folder {path}.")
    folders = [path] if event_files(path) else list(_runs_below(path))
    if not folders:
        raise NoRunError(
            f"There is no {FILE_NAME} in {path} or below it: no run has started there with a callback of this package"
            " that was asked for. Give a run's log folder, such as lightning_logs/version_0, or one above it."
        )
    return max(folders, key=lambda folder: max(map(_modified, event_files(folder))))


def event_files(folder: Path) -> list[Path]:
    """The files by which a run's folder is known."""
    return [path for path in (folder / FILE_NAME, folder / PREVIOUS_FILE_NAME) if path.exists()]


def _runs_below(path: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(path):
        depth = len(Path(folder).relative_to(path).parts)
        names[:] = [n for n in names if depth < _DEPTH and n != "checkpoints" and not n.startswith(".")]
        if FILE_NAME in files:
            yield Path(folder)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # a file that has just been renamed
        return 0.0
