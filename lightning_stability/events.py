"""events.jsonl: the one record of what happened in a run, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_stability.atomic import append

FILE_NAME = "events.jsonl"
PREVIOUS_FILE_NAME = "events.1.jsonl"
LARGEST = 2**53
"""Of a whole number: a larger one is no count of anything, and no float holds it."""
_FIELDS: dict[str, Any] = dict(event=str, step=int, epoch=int, time=(int, float), rank=int, lost=int)  # noqa: C408
_warned: set[Path] = set()
"""Files that could not be written, of all the logs in this process."""


class EventLog:
    """Appends a run's events to `events.jsonl` in its log folder.

    Every line has `event`, `step`, `epoch`, `time` (seconds since 1970) and `rank`, then what the event
    itself says. A line is written whole and handed to the operating system at once, so that a killed run
    keeps what it wrote and the processes of one machine can share the file. When the file has reached
    `max_bytes` it becomes `events.1.jsonl`, replacing the one before it: the newest events survive, in at
    most twice that size. The newest `training_started` is copied to the head of a new file, with `"repeated": true`.

    A line that cannot be written never ends a run: one warning is given for the file, each later event tries again,
    and the next line that is written has `lost`, the number of those before it that were not.

    Args:
        folder: The run's log folder, or None: then nothing is written.
        rank: The global rank of this process.
        max_bytes: The size at which a new file is begun.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> EventLog(folder).write("checkpoint_saved", step=3, epoch=0, path="last.ckpt")
        >>> [event] = read_events(folder)
        >>> event["event"], event["step"], event["path"]
        ('checkpoint_saved', 3, 'last.ckpt')
    """

    def __init__(self, folder: str | os.PathLike[str] | None, rank: int = 0, max_bytes: int = 16 * 2**20) -> None:
        self.path = None if folder is None else Path(folder) / FILE_NAME
        self._rank = rank
        self._max_bytes = max_bytes
        self._lost = 0

    def write(self, event: str, step: int, epoch: int, **details: Any) -> None:
        """Append one event.

        Args:
            event: What happened, in snake_case, for example `"gradient_norm_rising"`.
            step: The optimizer steps completed before it.
            epoch: The epoch in which it happened.
            details: Whatever else JSON can hold. A number that is not finite is written as a string ("nan",
                "inf"), because JSON has none, and so is what it cannot hold.
        """
        if self.path is None:
            return
        line = {
            "event": event,
            "step": step,
            "epoch": epoch,
            "time": time.time(),
            "rank": self._rank,
            **({"lost": self._lost} if self._lost else {}),
            **details,
        }
        try:
            self._append(self.path, (json.dumps(_finite_json(line), allow_nan=False, default=str) + "\n").encode())
            self._lost = 0
        except Exception as error:  # whatever it is, the run goes before its record
            self._lost += 1
            warn_once_of(self.path, error)

    def _append(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._rank == 0 and path.is_file() and path.stat().st_size + len(data) > self._max_bytes:
            data = _last_start(path) + data
            path.replace(path.with_name(PREVIOUS_FILE_NAME))
        # Opened for each line: events are rare, and another process may have begun a new file in between.
        append(path, data)


class Events(Iterator[dict[str, Any]]):
    """A run's events, oldest first.

    Example:
        >>> import tempfile
        >>> list(read_events(tempfile.mkdtemp()))
        []
    """

    def __init__(self, events: list[dict[str, Any]], unreadable: int) -> None:
        self._events = iter(events)
        self.unreadable = unreadable
        """Lines that were passed over: cut short by a kill or a full disk, or no event at all."""

    def __next__(self) -> dict[str, Any]:
        return next(self._events)


def read_events(folder: str | os.PathLike[str]) -> Events:
    """Read a run's events, oldest first.

    Lines that are not whole are passed over, with a warning that says how many there are.

    Args:
        folder: The run's log folder.

    Returns:
        One dict per event, and in `unreadable` the number of lines that were passed over.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> EventLog(folder).write("update_skipped", step=3, epoch=0, why="the loss was nan")
        >>> [(event["step"], event["why"]) for event in read_events(folder)]
        [(3, 'the loss was nan')]
    """
    events, unreadable = [], 0
    for name in (PREVIOUS_FILE_NAME, FILE_NAME):
        path = Path(folder) / name
        for line in filter(None, path.read_bytes().split(b"\n") if path.is_file() else ()):
            event = parse_event(line)
            if event is None:
                unreadable += 1
            else:
                events.append(event)
    if unreadable:
        warnings.warn(f"{folder}: unreadable lines of {FILE_NAME}, passed over: {unreadable}.", stacklevel=2)
    return Events(events, unreadable)


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The event that a line holds; None if it is cut short or no event.

    Example:
        >>> parse_event(b'{"event": "x", "step": 0, "epo')
    """
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not {"event", "step"} <= event.keys():
        return None
    return event if all(_is_field(event[name], _FIELDS[name]) for name in event.keys() & _FIELDS.keys()) else None


def _is_field(value: Any, kind: Any) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return isinstance(value, str) or -LARGEST <= value <= LARGEST  # (which nan is not)


def warn_once_of(path: Path, error: Exception) -> None:
    """Say that a record of the run cannot be written; once for each file."""
    if path in _warned:
        return
    _warned.add(path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # where warnings are made errors, this one would end the run
        warnings.warn(
            f"{path} cannot be written ({error}). Training continues without that record; each event tries again"
            + (", and the next line that is written says how many were lost." if path.suffix == ".jsonl" else "."),
            stacklevel=4,
        )


def _last_start(path: Path) -> bytes:
    """The line that says when the training under way was started, marked as a copy; nothing if there is none."""
    for line in reversed(path.read_bytes().split(b"\n")):
        event = parse_event(line) if line.startswith(b'{"event": "training_started"') else None
        if event is not None:
            return json.dumps({**event, "repeated": True}).encode() + b"\n"
    return b""


def _finite_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_json(item) for item in value]
    return value
