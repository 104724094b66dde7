"""The index of a cache: a journal of what is finished, from which a build goes on and a cache is opened.

``index.jsonl`` has one JSON object a line. The first one holds the settings, each further one a recording: its place
in the array, or why it was left out. The last line of a finished cache says so. A line is written when what it tells
of is on the disk, so that a kill leaves at most one line without its end, which does not count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_stability.tuab.channels import CHANNELS
from lightning_stability.tuab.corpus import BAND, SAMPLING_RATE, Recording

INDEX, SAMPLES = "index.jsonl", "samples.f16"
DTYPE = np.dtype("<f2")
ROW_BYTES = len(CHANNELS) * DTYPE.itemsize
SETTINGS: dict[str, Any] = {
    "format": 2,
    "channels": list(CHANNELS),
    "sampling_rate": SAMPLING_RATE,
    "band": list(BAND),
    "normalisation": "median and interquartile range, per recording and channel",
}

_FIRST_INDEX = "index.json"  # that of format 1

Stamp = list[int]
"""Size in bytes and time of change in nanoseconds of a file."""


@dataclass(frozen=True)
class CachedRecording(Recording):
    """A recording and its place in the array: rows ``start`` to ``start + samples``."""

    start: int
    samples: int


@dataclass
class CacheIndex:
    """What an index says.

    Args:
        recordings: What is in the array, in the order of `find_recordings`.
        skipped: Paths of the recordings that were left out, and why.
        files: The stamp of every recording's file, those left out as well.
        clipped: How many samples were cut to the range of fp16.
        complete: Whether the build came to its end.
        size: Bytes of the whole lines.
    """

    recordings: list[CachedRecording] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    files: dict[str, Stamp] = field(default_factory=dict)
    clipped: int = 0
    complete: bool = False
    size: int = 0

    @property
    def rows(self) -> int:
        """Samples of all recordings together."""
        return sum(recording.samples for recording in self.recordings)


def read_index(folder: Path) -> CacheIndex:
    """Read what is finished of the cache in ``folder``; nothing, if none was begun.

    Raises:
        MisconfigurationException: If it was made with other settings, or is damaged.
    """
    if (folder / _FIRST_INDEX).exists():
        raise refusal(folder, [f"format is 1 ({_FIRST_INDEX}), expected {SETTINGS['format']}"])
    path = folder / INDEX
    if not path.exists():
        return CacheIndex()
    try:
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        lines = json.loads(b"[" + b",".join(whole.splitlines()) + b"]")
        if not lines:
            return CacheIndex()
        settings, *entries = lines
        index = CacheIndex(complete=bool(entries) and "complete" in entries[-1], size=len(whole))
        different = [
            f"{key} is {settings.get(key)!r}, expected {value!r}"
            for key, value in SETTINGS.items()
            if settings.get(key) != value
        ]
        if not different:
            for entry in entries[:-1] if index.complete else entries:
                _add(index, entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MisconfigurationException(
            f"{path} cannot be read ({type(error).__name__}: {error}). Delete the folder to build the cache anew, or "
            "choose another one with --data.cache_dir."
        ) from error
    if different:
        raise refusal(folder, different)
    # as find_recordings lists them, in whatever order they were finished
    index.recordings.sort(key=lambda recording: (recording.official_split == "eval", recording.label, recording.path))
    _check_samples(folder, index)
    return index


def _add(index: CacheIndex, entry: dict[str, Any]) -> None:
    path = entry["path"]
    index.files[path] = entry.pop("stamp")
    if "skipped" in entry:
        index.skipped[path] = entry["skipped"]
    else:
        index.clipped += entry.pop("clipped")
        index.recordings.append(CachedRecording(**entry))


def _check_samples(folder: Path, index: CacheIndex) -> None:
    try:
        found = (folder / SAMPLES).stat().st_size
    except FileNotFoundError:
        found = 0
    expected = index.rows * ROW_BYTES
    # behind what is finished there may be the beginning of a recording that a kill cut short
    if found < expected or (index.complete and found > expected):
        raise refusal(folder, [f"{SAMPLES} has {found} bytes, expected {expected}"])


def refusal(folder: Path, different: Sequence[str]) -> MisconfigurationException:
    """Return the error that says in what the cache in ``folder`` differs from what is needed."""
    return MisconfigurationException(
        f"The cache in {folder} cannot be used: {'; '.join(different)}. Delete the folder to build it anew, or choose "
        "another one with --data.cache_dir."
    )


def settings_line() -> bytes:
    """Return the first line of an index."""
    return _line(SETTINGS)


def cached_line(recording: CachedRecording, stamp: Stamp, clipped: int) -> bytes:
    """Return the line of a recording that is in the array."""
    return _line({**asdict(recording), "stamp": stamp, "clipped": clipped})


def skipped_line(path: str, stamp: Stamp, reason: str) -> bytes:
    """Return the line of a recording that was left out."""
    return _line({"path": path, "skipped": reason, "stamp": stamp})


def last_line() -> bytes:
    """Return the line that ends the index of a finished cache."""
    return _line({"complete": True})


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def file_stamps(root: str | Path, recordings: Sequence[Recording]) -> dict[str, Stamp]:
    """Return the stamp of each recording's file, by which a cache knows that it is out of date."""
    stamps = {}
    for recording in recordings:
        try:
            stat = (Path(root) / recording.path).stat()
            stamps[recording.path] = [stat.st_size, stat.st_mtime_ns]
        except OSError:  # a link to nowhere, such as git-annex leaves: it is left out when it is read
            stamps[recording.path] = [0, 0]
    return stamps


def refuse_changes(folder: Path, root: str | Path, now: Mapping[str, Stamp], index: CacheIndex) -> None:
    """Refuse a cache of files that are others now.

    New files are none of its business as long as the build is not finished.

    Raises:
        MisconfigurationException: If there are any; the message names some.
    """
    paths = now.keys() | index.files.keys() if index.complete else index.files.keys()
    changed = [path for path in sorted(paths) if now.get(path) != index.files.get(path)]
    if changed:
        more = ", ..." if len(changed) > 3 else ""
        raise MisconfigurationException(
            f"{root} has changed since {folder} was built: {len(changed)} files are new, gone or of another size or "
            f"date ({', '.join(changed[:3])}{more}). Delete that folder to build it anew."
        )
