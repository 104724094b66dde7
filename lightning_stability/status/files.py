"""Following the files of a run while they are written: each look reads only what is new, at first only the end."""

from __future__ import annotations

import csv
import io
import os
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c  # type: ignore[import-untyped]

from lightning_stability.events import FILE_NAME, PREVIOUS_FILE_NAME, parse_event

TAIL_BYTES = 2**20
"""How much of the end of a log is read at the first look."""
_KEPT_POINTS = 2000


class Point(NamedTuple):
    """One logged number."""

    step: int
    value: float
    time: float | None
    """When it was logged, in seconds since 1970; a CSV file does not say."""


class EventsFile:
    """The lines of `events.jsonl`, each once, over the change to a new file too.

    Args:
        folder: The run's log folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._previous = folder / PREVIOUS_FILE_NAME
        self._open: BinaryIO | None = None
        self._rest = b""
        self.unreadable = 0
        """Lines that were passed over: cut short by a kill or a full disk, or no event at all."""

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the events since the last call, oldest first; a line that is still being written comes next time."""
        if self._open is None:
            yield from self._follow(self._previous)
        elif not _is_same(self._open, self._path):  # renamed under our hands, which still hold it
            yield from self._lines()
            if not _is_same(self._open, self._previous):
                yield from self._follow(self._previous)
        if self._open is None or not _is_same(self._open, self._path):
            yield from self._follow(self._path)
        else:
            yield from self._lines()

    def close(self) -> None:
        """Let go of the file."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _follow(self, path: Path) -> Iterator[dict[str, Any]]:
        try:
            opened = path.open("rb")
        except OSError:
            return
        self.close()
        self._open, self._rest = opened, b""
        yield from self._lines()

    def _lines(self) -> Iterator[dict[str, Any]]:
        assert self._open is not None
        *lines, self._rest = (self._rest + self._open.read()).split(b"\n")
        for line in filter(None, lines):
            event = parse_event(line)
            if event is None:
                self.unreadable += 1
            else:
                yield event


class TensorBoardFile:
    """The scalars of one TensorBoard event file, each once.

    Args:
        path: The file.
        tail_bytes: How much of its end is read at the first look.
    """

    def __init__(self, path: Path, tail_bytes: int = TAIL_BYTES) -> None:
        self._file = path.open("rb")
        start = max(0, os.fstat(self._file.fileno()).st_size - tail_bytes)
        self._file.seek(start)
        self._buffer = b""

    def read(self) -> Iterator[tuple[str, Point]]:
        """Yield tag and value of what was logged since the last call; a record still being written comes next time."""
        self._buffer += self._file.read()
        place = 0
        while (place := self._next_record(place)) + 12 <= len(self._buffer):
            (length,) = struct.unpack_from("<Q", self._buffer, place)
            end = place + 12 + length + 4
            if end > len(self._buffer):
                break
            event = Event.FromString(self._buffer[place + 12 : end - 4])
            place = end
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    yield value.tag, Point(event.step, value.simple_value, event.wall_time)
        self._buffer = self._buffer[place:]

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _next_record(self, place: int) -> int:
        """Where the next record begins: its length is followed by a check sum of the length.

        That is at `place` but for the first look at a file's end, which begins anywhere.
        """
        buffer = self._buffer
        while place + 12 <= len(buffer):
            # no record is as long as 4 GiB: the upper half of its length is 0
            zeros = buffer.find(b"\0\0\0\0", place + 4)
            place = zeros - 4 if zeros >= 0 else len(buffer) - 11
            if place + 12 <= len(buffer):
                (check,) = struct.unpack_from("<I", buffer, place + 8)
                if masked_crc32c(buffer[place : place + 8]) == check:
                    return place
                place += 1
        return place


class CsvFile:
    """The newest rows of a CSVLogger's `metrics.csv`, which is written anew when a column is added.

    Args:
        path: The file.
        tail_bytes: How much of its end is read.
    """

    def __init__(self, path: Path, tail_bytes: int = TAIL_BYTES // 4) -> None:
        self._path = path
        self._tail_bytes = tail_bytes
        self._seen: tuple[int, int] | None = None
        self._series: dict[str, list[Point]] = {}

    def read(self) -> dict[str, list[Point]]:
        """Return the columns; rows cut short, as while it is written, are left out."""
        try:
            status = self._path.stat()
        except OSError:
            return self._series
        if (status.st_mtime_ns, status.st_size) == self._seen or not status.st_size:
            return self._series
        with self._path.open("rb") as file:
            head = file.readline()
            file.seek(max(len(head), status.st_size - self._tail_bytes))
            tail = file.read()
        if status.st_size - self._tail_bytes > len(head):
            tail = tail.partition(b"\n")[2]
        whole = tail[: tail.rfind(b"\n") + 1]
        names = next(csv.reader([head.decode()]), [])
        series: dict[str, list[Point]] = {}
        for row in csv.reader(io.StringIO(whole.decode())):
            cells = dict(zip(names, row, strict=False)) if len(row) == len(names) else {}
            step = _number(cells.pop("step", ""))
            for name, cell in cells.items() if step is not None else ():
                value = _number(cell)
                if value is not None:
                    series.setdefault(name, []).append(Point(int(step or 0), value, None))
        if series:
            self._series, self._seen = series, (status.st_mtime_ns, status.st_size)
        return self._series


class Logs:
    """What TensorBoard's files and `metrics.csv` in a run's folder say.

    Args:
        folder: The run's log folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._boards: dict[Path, TensorBoardFile] = {}
        self._csv = CsvFile(folder / "metrics.csv")
        self._points: dict[str, deque[Point]] = {}

    def read(self, since: float = 0.0) -> dict[str, list[Point]]:
        """Return each tag's newest values, oldest first.

        Args:
            since: Values logged before this moment are an earlier start's, in seconds since 1970.
        """
        for path in board_files(self._folder):
            if path not in self._boards:
                self._boards[path] = TensorBoardFile(path)
            for tag, point in self._boards[path].read():
                self._points.setdefault(tag, deque(maxlen=_KEPT_POINTS)).append(point)
        series = dict(self._csv.read())
        for tag, points in self._points.items():
            fresh = list(points)
            if (fresh[0].time or since) < since:
                fresh = [point for point in fresh if (point.time or since) >= since]
            if fresh:
                series[tag] = fresh
        return series

    def close(self) -> None:
        """Let go of the files."""
        for board in self._boards.values():
            board.close()


def board_files(folder: Path) -> list[Path]:
    """TensorBoard's files of a folder, oldest first.

    Args:
        folder: The folder.
    """
    return sorted(folder.glob("events.out.tfevents.*"))


def _is_same(opened: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except OSError:
        return False


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
