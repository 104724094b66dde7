"""Leaving out of the training set what an earlier run's InputCheck has flagged."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from lightning_stability.tuab.cache import WindowDataset
from lightning_stability.tuab.corpus import SAMPLING_RATE

_DESCRIPTION = re.compile(r"(?P<path>.+), window at (?P<seconds>\d+(\.\d+)?) s")
_COLUMNS = ("epoch", "batch_idx", "rank", "sample", "description", "reason")  # of flagged_inputs.csv: those we count on


def describe_window(path: str, start: int) -> str:
    """Name a window for people, in a form that `parse_window` reads.

    Args:
        start: The window's first sample in it.

    Example::

        >>> describe_window("edf/train/normal/01_tcp_ar/aaaaabcd_s001_t000.edf", 1088)
        'edf/train/normal/01_tcp_ar/aaaaabcd_s001_t000.edf, window at 4.25 s'
    """
    seconds = f"{start / SAMPLING_RATE:.8f}".rstrip("0").rstrip(".")  # 1/256 s has eight decimals
    return f"{path}, window at {seconds} s"


def parse_window(description: str) -> tuple[str, int] | None:
    """Return the path and the first sample that a description names; None if it is none.

    Args:
        description: What `describe_window` returned.

    Example::

        >>> parse_window("edf/train/normal/01_tcp_ar/aaaaabcd_s001_t000.edf, window at 4.25 s")
        ('edf/train/normal/01_tcp_ar/aaaaabcd_s001_t000.edf', 1088)
    """
    match = _DESCRIPTION.fullmatch(description)
    return (match["path"], round(float(match["seconds"]) * SAMPLING_RATE)) if match else None


def read_flagged(file: str | Path) -> list[tuple[str, int]]:
    """Return path and first sample of each window that a ``flagged_inputs.csv`` names, each once, in its order.

    Lines that name no sample, because nobody could tell which of a batch it was, are passed over; so are lines that a
    kill or a full disk has cut short, with a warning.

    Args:
        file: Written by InputCheck in a run on a TUABDataModule.

    Raises:
        MisconfigurationException: If the file is missing, or is something else.
    """
    expected = "expected a flagged_inputs.csv that InputCheck wrote in a run on TUAB recordings"
    try:
        with Path(file).open(newline="", encoding="utf-8") as opened:
            rows = csv.DictReader(opened)
            missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
            read = [] if missing else list(rows)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MisconfigurationException(
            f"--data.exclude {file} cannot be read ({type(error).__name__}: {error}); {expected}."
        ) from error
    if missing:
        raise MisconfigurationException(f"--data.exclude {file} has no column {', '.join(missing)}; {expected}.")
    whole = [row for row in read if all(row[name] is not None for name in rows.fieldnames or ())]
    if len(whole) < len(read):
        rank_zero_warn(f"{file}: lines that were cut short, passed over: {len(read) - len(whole)}.")
    windows: dict[tuple[str, int], None] = {}
    for description in (row["description"] for row in whole if row["description"]):
        window = parse_window(description)
        if window is None:
            raise MisconfigurationException(
                f"--data.exclude {file} names {description!r}, which is no window; {expected}."
            )
        windows[window] = None
    return list(windows)


class RemainingWindows(WindowDataset):
    """A dataset's windows without some of them, otherwise the same and in the same order."""

    def __init__(self, whole: WindowDataset, excluded: Sequence[int]) -> None:
        self._whole = whole
        self.cache, self.indices, self.length, self.stride = whole.cache, whole.indices, whole.length, whole.stride
        self._excluded = np.unique(np.asarray(excluded, dtype=np.int64))
        self._kept_before = self._excluded - np.arange(len(self._excluded))  # how many kept ones precede each

    def __len__(self) -> int:
        return len(self._whole) - len(self._excluded)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        index %= len(self)
        return self._whole[index + int(np.searchsorted(self._kept_before, index, side="right"))]

    @property
    def labels(self) -> npt.NDArray[np.int8]:
        """The class of each window, shape (windows,)."""
        labels = [self.cache.recordings[index].label for index in self.indices]
        windows = np.diff(self._whole._ends, prepend=0)
        return np.delete(np.repeat(np.array(labels, dtype=np.int8), windows), self._excluded)


def leave_out(
    file: str | Path, train: WindowDataset, known: Mapping[str, int]
) -> tuple[WindowDataset, list[tuple[str, int]]]:
    """Leave the windows that a ``flagged_inputs.csv`` names out of the training set.

    Args:
        known: The index of each of the corpus' recordings, by path.

    Returns:
        What remains of it, and what was left out: path and first sample of each.

    Raises:
        MisconfigurationException: If the file is none, names recordings that are not there or windows of another
            length or distance, or if nothing remains.
    """
    flagged = read_flagged(file)
    gone = sorted({path for path, _ in flagged if path not in known})
    if gone:
        raise MisconfigurationException(
            f"--data.exclude {file} names {len(gone)} recordings that are not in this corpus ({gone[0]}"
            f"{', ...' if len(gone) > 1 else ''}); expected a file from a run on the same --data.root."
        )
    places = {int(index): place for place, index in enumerate(train.indices)}
    ends = [0, *train._ends.tolist()]
    numbers, left_out = [], []
    for path, start in flagged:
        place = places.get(known[path])
        if place is None:
            continue  # a recording that is not trained on
        number, rest = divmod(start, train.stride)
        if rest or not number < ends[place + 1] - ends[place]:
            raise MisconfigurationException(
                f"--data.exclude {file} names {describe_window(path, start)!r}, which is none of this run's windows:"
                " expected a file from a run with the same --data.window_seconds and --data.stride_seconds."
            )
        numbers.append(ends[place] + number)
        left_out.append((path, start))
    if len(numbers) == len(train):
        raise MisconfigurationException(f"--data.exclude {file} names every window of the training set.")
    return (RemainingWindows(train, numbers) if numbers else train), left_out
