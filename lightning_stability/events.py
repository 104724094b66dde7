"""events.jsonl: the one record of what happened in a run, one JSON object a line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_NAME = "events.jsonl"
PREVIOUS_FILE_NAME = "events.1.jsonl"


class EventLog:
    """Appends a run's events to `events.jsonl` in its log folder.

    Every line has `event`, `step`, `epoch`, `time` (seconds since 1970) and `rank`, then what the event
    itself says. A line is written whole and handed to the operating system at once, so that a killed run
    keeps what it wrote and the processes of one machine can share the file. When the file has reached
    `max_bytes` it becomes `events.1.jsonl`, replacing the one before it: the newest events survive, in at
    most twice that size. The newest `training_started` is copied to the head of a new file, with `"repeated": true`.

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

    def write(self, event: str, step: int, epoch: int, **details: Any) -> None:
        """Append one event.

        Args:
            event: What happened, in snake_case, for example `"gradient_norm_rising"`.
            step: The optimizer steps completed before it.
            epoch: The epoch in which it happened.
            details: Whatever else JSON can hold. A number that is not finite is written as a string ("nan",
                "inf"), because JSON has none.
        """
        if self.path is None:
            return
        line = {
            "event": event,
            "step": step,
            "epoch": epoch,
            "time": time.time(),
            "rank": self._rank,
            **details,
        }
        data = (json.dumps(_finite_json(line), allow_nan=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._rank == 0 and self.path.exists() and self.path.stat().st_size + len(data) > self._max_bytes:
            data = _last_start(self.path) + data
            self.path.replace(self.path.with_name(PREVIOUS_FILE_NAME))
        # Opened for each line: events are rare, and another process may have begun a new file in between.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, data)  # one call, so that lines of several processes do not mix
        finally:
            os.close(descriptor)


def read_events(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Read a run's events, oldest first.

    A last line that a killed process left unfinished is passed over.

    Args:
        folder: The run's log folder.

    Yields:
        One dict per event.
    """
    for name in (PREVIOUS_FILE_NAME, FILE_NAME):
        path = Path(folder) / name
        if not path.exists():
            continue
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def _last_start(path: Path) -> bytes:
    """The line that says when the training under way was started, marked as a copy; nothing if there is none."""
    content = path.read_bytes()
    begin = content.rfind(b'{"event": "training_started"')
    line, newline, _ = content[max(begin, 0) :].partition(b"\n")
    if begin < 0 or not newline:
        return b""
    return json.dumps({**json.loads(line), "repeated": True}).encode() + newline


def _finite_json(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_json(item) for item in value]
    return value
