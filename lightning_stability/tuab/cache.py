"""A cache of preprocessed recordings, whole, in one fp16 array; windows are offsets into it.

A cache is a folder, written by :func:`~lightning_stability.tuab.build_cache`::

    samples.f16    little-endian float16, shape (samples of all recordings, 19), recordings one after the other
    index.jsonl    the settings it was made with, each recording's place in the array, and what was left out
    skipped.txt    what was left out and why, to be read by people

One cache serves every window length and stride. A window is one contiguous piece of the file, since time runs along the
first axis. It is read, not mapped: mapped pages would count as the process' memory, 36 GB after an epoch, and a file
that became shorter would kill it without a word.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import Dataset

from lightning_stability.tuab.channels import CHANNELS
from lightning_stability.tuab.corpus import window_samples
from lightning_stability.tuab.index import DTYPE, ROW_BYTES, SAMPLES, CachedRecording, read_index


class WindowCache:
    """An opened cache.

    Args:
        folder: Where :func:`build_cache` put it.

    Raises:
        MisconfigurationException: If the folder holds no complete cache, or one of other settings.

    Example:
        >>> import tempfile
        >>> from lightning_stability.tuab import SyntheticCorpus, build_cache, find_recordings
        >>> corpus = SyntheticCorpus(train_subjects=2, eval_subjects=1, seconds=(20, 20))
        >>> root = corpus.write(tempfile.mkdtemp())
        >>> build_cache(root, find_recordings(root), root / "cache", processes=1)
        >>> [recording.label for recording in WindowCache(root / "cache").recordings]
        [0, 1, 0]
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        if not self.index.complete:
            raise MisconfigurationException(
                f"{self.folder} holds no complete cache: {len(self.index.files)} recordings are finished. "
                "`TUABDataModule.prepare_data`, which every run calls, or `build_cache` continues from there."
            )
        self._file: int | None = None

    @property
    def recordings(self) -> list[CachedRecording]:
        """What is in the cache, in the order of `find_recordings`."""
        return self.index.recordings

    @property
    def skipped(self) -> dict[str, str]:
        """Paths of the recordings that were left out, and why."""
        return self.index.skipped

    def read(self, recording: int, start: int = 0, samples: int | None = None) -> npt.NDArray[np.float16]:
        """Read a piece of one recording.

        Args:
            recording: Index into ``recordings``.
            start: The piece's first sample.
            samples: Its length; None reads to the recording's end.

        Returns:
            Array of shape (samples, channels).

        Raises:
            OSError: If the file is shorter than it was.
        """
        place = self.recordings[recording]
        samples = place.samples - start if samples is None else samples
        if not 0 <= start <= start + samples <= place.samples:
            raise IndexError(f"samples {start} to {start + samples} of {place.samples} in {place.path}")
        rows = np.empty((samples, len(CHANNELS)), dtype=DTYPE)
        buffer, offset = rows.view(np.uint8).reshape(-1).data, (place.start + start) * ROW_BYTES
        while len(buffer):  # one call reads at most 2 GB
            read = os.preadv(self._descriptor(), [buffer], offset)
            if not read:
                raise OSError(f"{self.folder / SAMPLES} is shorter than it was when it was opened")
            buffer, offset = buffer[read:], offset + read
        return rows

    def _descriptor(self) -> int:
        # at first use in each process, or before a fork: reading at a place of one's own moves no common position
        if self._file is None:
            self._file = os.open(self.folder / SAMPLES, os.O_RDONLY)
        return self._file

    def __del__(self) -> None:
        descriptor: int | None = getattr(self, "_file", None)
        if descriptor is not None:
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # a worker of a loader opens the file itself


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

    Example:
        >>> import tempfile
        >>> from lightning_stability.tuab import SyntheticCorpus, build_cache, find_recordings
        >>> corpus = SyntheticCorpus(train_subjects=2, eval_subjects=1, seconds=(20, 20))
        >>> root = corpus.write(tempfile.mkdtemp())
        >>> build_cache(root, find_recordings(root), root / "cache", processes=1)
        >>> windows = WindowDataset(WindowCache(root / "cache"), indices=[0], window_seconds=8, stride_seconds=4)
        >>> len(windows), windows[0]["eeg"].shape
        (4, torch.Size([19, 2048]))
    """

    def __init__(
        self, cache: WindowCache, indices: Sequence[int], window_seconds: float, stride_seconds: float
    ) -> None:
        self.cache = cache
        self.length, self.stride = window_samples(window_seconds), window_samples(stride_seconds)
        self.indices = np.asarray(indices, dtype=np.int64)
        samples = np.array([cache.recordings[i].samples for i in indices], dtype=np.int64)
        windows = np.where(samples >= self.length, (samples - self.length) // self.stride + 1, 0)
        self._windows, self._ends = windows, np.cumsum(windows)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def labels(self) -> npt.NDArray[np.int8]:
        """The class of each window, shape (windows,)."""
        labels = [self.cache.recordings[index].label for index in self.indices]
        return np.repeat(np.array(labels, dtype=np.int8), self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        index %= len(self)
        place = int(np.searchsorted(self._ends, index, side="right"))
        number = int(self.indices[place])
        recording = self.cache.recordings[number]
        start = (index - int(self._ends[place - 1] if place else 0)) * self.stride
        rows = torch.from_numpy(self.cache.read(number, start, self.length))
        return {
            "eeg": rows.T.to(torch.float32, memory_format=torch.contiguous_format),
            "label": torch.tensor(recording.label),
            "recording": torch.tensor(number),
            "start": torch.tensor(start),
        }
