"""Preprocessed recordings, whole, in one memory-mapped fp16 array; windows are offsets into it.

A cache is a folder::

    samples.f16    little-endian float16, shape (samples of all recordings, 19), recordings one after the other
    index.json     the settings it was made with, each recording's place in the array, and what was left out

One cache serves every window length and stride. A window is one contiguous piece of the file, since time runs along the
first axis. ``index.json`` is written last, so a folder without it holds no cache.
"""

from __future__ import annotations

import json
import os
import socket
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch.utils.data import Dataset
from tqdm import tqdm

from lightning_stability.tuab.channels import CHANNELS
from lightning_stability.tuab.corpus import BAND, SAMPLING_RATE, Recording, read_recording, window_samples

_SETTINGS: dict[str, Any] = {
    "format": 1,
    "channels": list(CHANNELS),
    "sampling_rate": SAMPLING_RATE,
    "band": list(BAND),
    "normalisation": "median and interquartile range, per recording and channel",
}
_DTYPE = np.dtype("<f2")
_MAX = float(np.finfo(_DTYPE).max)


@dataclass(frozen=True)
class CachedRecording(Recording):
    """A recording and its place in the array: rows ``start`` to ``start + samples``."""

    start: int
    samples: int


class WindowCache:
    """An opened cache.

    Args:
        folder: Where :func:`build_cache` put it.

    Raises:
        MisconfigurationException: If the folder holds no complete cache, or one of other settings.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / "index.json").read_text())
            self.recordings = [CachedRecording(**entry) for entry in index["recordings"]]
            self.skipped: dict[str, str] = index["skipped"]
            self.files: dict[str, list[int]] = index["files"]
            settings, found = index["settings"], (self.folder / "samples.f16").stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MisconfigurationException(
                f"{self.folder} holds no cache that can be opened ({type(error).__name__}: {error}). Delete the folder "
                "to build it anew, or choose another one with --data.cache_dir."
            ) from error
        different = [
            f"{key} is {settings.get(key)!r}, expected {value!r}"
            for key, value in _SETTINGS.items()
            if settings.get(key) != value
        ]
        expected = self.rows * len(CHANNELS) * _DTYPE.itemsize
        if found != expected:
            different.append(f"samples.f16 has {found} bytes, expected {expected}")
        if different:
            raise MisconfigurationException(
                f"The cache in {self.folder} cannot be used: {'; '.join(different)}. Delete the folder to build it "
                "anew, or choose another one with --data.cache_dir."
            )
        self._samples: npt.NDArray[np.float16] | None = None

    @property
    def rows(self) -> int:
        """Number of samples of all recordings together."""
        return sum(recording.samples for recording in self.recordings)

    @property
    def samples(self) -> npt.NDArray[np.float16]:
        """The memory-mapped array, shape (samples, channels), opened at first use in each process."""
        if self._samples is None:
            self._samples = np.memmap(
                self.folder / "samples.f16", dtype=_DTYPE, mode="r", shape=(self.rows, len(CHANNELS))
            )
        return self._samples

    def __getstate__(self) -> dict[str, Any]:
        # a memory map would be pickled as the array that it maps, for each worker of a loader
        return {**self.__dict__, "_samples": None}


def build_cache(root: str | Path, recordings: Sequence[Recording], folder: str | Path) -> None:
    """Preprocess ``recordings`` and write them to ``folder``.

    A recording that cannot be read is left out, with a warning and its reason in the index. Values beyond the range of
    fp16 are cut to it, counted and warned of.

    Args:
        root: The corpus' root.
        recordings: What to read, from :func:`~lightning_stability.tuab.corpus.find_recordings`.
        folder: Where to write; made if it is missing.

    Raises:
        MisconfigurationException: If no recording could be read.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MisconfigurationException(f"The cache cannot be written to {folder}: {error}") from error
    _remove_leftovers(folder)
    # under a name of this process, so that two builders do not write into one file
    partial = folder / f"samples.{socket.gethostname()}.{os.getpid()}.partial"
    files = file_stamps(root, recordings)
    cached: list[CachedRecording] = []
    skipped: dict[str, str] = {}
    start = clipped = 0
    try:
        with partial.open("wb") as file:
            for recording in tqdm(recordings, desc="Preprocessing recordings", unit="recording"):
                try:
                    signal = read_recording(Path(root) / recording.path)
                except ValueError as error:
                    skipped[recording.path] = str(error)
                    continue
                clipped += int((np.abs(signal) > _MAX).sum())
                file.write(np.ascontiguousarray(signal.clip(-_MAX, _MAX).T, dtype=_DTYPE).tobytes())
                cached.append(CachedRecording(**asdict(recording), start=start, samples=signal.shape[1]))
                start += signal.shape[1]
        _report(skipped, clipped, start)
        if not cached:
            raise MisconfigurationException(f"None of the {len(recordings)} recordings under {root} could be read.")
        partial.replace(folder / "samples.f16")
    finally:
        partial.unlink(missing_ok=True)
    index = {"settings": _SETTINGS, "recordings": [asdict(r) for r in cached], "skipped": skipped, "files": files}
    written = folder / f"index.{os.getpid()}.partial"
    written.write_text(json.dumps(index, indent=1))
    written.replace(folder / "index.json")
    rank_zero_info(f"Cached {len(cached)} recordings in {folder} ({start / SAMPLING_RATE / 3600:.1f} hours).")


def file_stamps(root: str | Path, recordings: Sequence[Recording]) -> dict[str, list[int]]:
    """Return size and time of change (ns) of each recording's file, by which a cache knows that it is out of date."""
    stamps = {}
    for recording in recordings:
        stat = (Path(root) / recording.path).stat()
        stamps[recording.path] = [stat.st_size, stat.st_mtime_ns]
    return stamps


def _remove_leftovers(folder: Path) -> None:
    """Delete what builders of this machine left behind that were killed."""
    for partial in folder.glob(f"samples.{socket.gethostname()}.*.partial"):
        try:
            os.kill(int(partial.suffixes[-2][1:]), 0)
        except ProcessLookupError:
            partial.unlink(missing_ok=True)
        except PermissionError:
            pass  # it runs, under another user


def _report(skipped: dict[str, str], clipped: int, rows: int) -> None:
    if skipped:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in list(skipped.items())[:10])
        more = f"\n  and {len(skipped) - 10} more, in index.json" if len(skipped) > 10 else ""
        warnings.warn(f"{len(skipped)} recordings were left out:{reasons}{more}", stacklevel=3)
    if clipped:
        warnings.warn(
            f"{clipped} of {rows * len(CHANNELS)} samples are beyond the range of fp16 and were cut to ±{_MAX:g}.",
            stacklevel=3,
        )


class WindowDataset(Dataset[dict[str, torch.Tensor]]):
    """Windows of equal length and distance from some of a cache's recordings.

    Each item is a dictionary: ``eeg``, float32 of shape (19, samples), in units of the recording's deviation;
    ``label``, 0 normal or 1 abnormal; ``recording``, the index into ``cache.recordings``; ``start``, the window's first
    sample in that recording.

    Args:
        cache: An opened cache.
        indices: Which of ``cache.recordings`` to use.
        window_seconds: Length of a window.
        stride_seconds: Distance from one window's start to the next one's.
    """

    def __init__(
        self, cache: WindowCache, indices: Sequence[int], window_seconds: float, stride_seconds: float
    ) -> None:
        self.cache = cache
        self.length, self.stride = window_samples(window_seconds), window_samples(stride_seconds)
        self.indices = np.asarray(indices, dtype=np.int64)
        samples = np.array([cache.recordings[i].samples for i in indices], dtype=np.int64)
        windows = np.where(samples >= self.length, (samples - self.length) // self.stride + 1, 0)
        self._ends = np.cumsum(windows)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        index %= len(self)
        place = int(np.searchsorted(self._ends, index, side="right"))
        number = int(self.indices[place])
        recording = self.cache.recordings[number]
        start = (index - int(self._ends[place - 1] if place else 0)) * self.stride
        rows = self.cache.samples[recording.start + start : recording.start + start + self.length]
        return {
            "eeg": torch.from_numpy(np.ascontiguousarray(rows.T, dtype=np.float32)),
            "label": torch.tensor(recording.label),
            "recording": torch.tensor(number),
            "start": torch.tensor(start),
        }
