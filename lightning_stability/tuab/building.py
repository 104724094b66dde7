"""Building a cache: one process writes, others preprocess, and whatever is finished outlasts a kill.

The builder holds a lock on the index, which the system takes from it when it ends, however it ends. A second builder
waits for it and then goes on with what is left: nothing, as a rule. Samples reach the disk before the line of the index
that tells of them.
"""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from tqdm import tqdm

from lightning_stability.atomic import replace_file
from lightning_stability.tuab.channels import CHANNELS
from lightning_stability.tuab.corpus import SAMPLING_RATE, Recording
from lightning_stability.tuab.index import (
    INDEX,
    ROW_BYTES,
    SAMPLES,
    CachedRecording,
    CacheIndex,
    Stamp,
    cached_line,
    file_stamps,
    last_line,
    read_index,
    refuse_changes,
    settings_line,
    skipped_line,
)
from lightning_stability.tuab.preprocessing import MAX, Preprocessed, preprocess_all, suitable_processes

REPORT = "skipped.txt"


def build_cache(
    root: str | Path, recordings: Sequence[Recording], folder: str | Path, processes: int | None = None
) -> None:
    """Preprocess ``recordings`` and write them to ``folder``, or go on with what is there already.

    A build that was killed goes on where it was: what is finished is not read again. Of several builders of one folder
    one works and the others wait. A recording that cannot be used is left out; ``skipped.txt`` in ``folder`` names it
    and the reason. Values beyond the range of fp16 are cut to it, counted and warned of.

    Args:
        root: The corpus' root.
        recordings: What to read, from :func:`~lightning_stability.tuab.corpus.find_recordings`.
        folder: Where to write; made if it is missing.
        processes: How many preprocess at once. None takes as many as there are CPU cores that this process may use, at
            most 16, and fewer where there is too little to read for their start to be worth it.

    Raises:
        MisconfigurationException: If no recording could be read, ``folder`` cannot be written to, or it holds a cache
            of other settings or of files that have changed since.
        RuntimeError: If a process that preprocesses was killed.

    Example:
        >>> import tempfile
        >>> from lightning_stability.tuab import SyntheticCorpus, WindowCache, build_cache, find_recordings
        >>> corpus = SyntheticCorpus(train_subjects=2, eval_subjects=1, seconds=(20, 20))
        >>> root = corpus.write(tempfile.mkdtemp())
        >>> build_cache(root, find_recordings(root), root / "cache", processes=1)
        >>> len(WindowCache(root / "cache").recordings)
        3
    """
    root, folder = Path(root), Path(folder)
    stamps = file_stamps(root, recordings)
    index = read_index(folder)
    refuse_changes(folder, root, stamps, index)
    if index.complete:  # before anything is written: the folder may be one that can only be read
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _opened(folder / INDEX, os.O_APPEND) as journal, _opened(folder / SAMPLES, 0) as samples:
            _lock(journal, folder)
            index = read_index(folder)  # again: another builder may have been at work until now
            refuse_changes(folder, root, stamps, index)
            if not index.complete:
                _build(root, recordings, folder, _Writer(samples, journal, index), stamps, processes)
    except OSError as error:
        raise MisconfigurationException(
            f"The cache cannot be written to {folder}: {error}. What is finished stays: start again to continue."
        ) from error


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Open ``path`` without a buffer, which would write again after an error what could not be written."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """Wait until no other process builds in ``folder``. The lock ends with ``descriptor``, by a kill as well."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        rank_zero_info(f"Another process builds the cache in {folder}: waiting for it.")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        warnings.warn(
            f"The file system of {folder} has no locks ({error}): two processes that build one cache at the same time "
            "would spoil it.",
            stacklevel=3,
        )


def _build(
    root: Path,
    recordings: Sequence[Recording],
    folder: Path,
    writer: _Writer,
    stamps: dict[str, Stamp],
    processes: int | None,
) -> None:
    index = writer.index
    missing = [recording for recording in recordings if recording.path not in index.files]
    if index.files:
        rank_zero_info(f"{len(index.files)} of {len(recordings)} recordings in {folder} are finished: continuing.")
    size = sum(stamps[recording.path][0] for recording in missing)
    processes = min(processes or suitable_processes(size), max(1, len(missing)))
    bar = tqdm(total=len(recordings), initial=len(index.files), desc="Preprocessing recordings", unit="recording")
    try:
        with writer, bar, closing(preprocess_all(root, missing, processes)) as results:
            for recording, result in results:
                writer.add(recording, stamps[recording.path], result)
                bar.set_postfix(skipped=len(index.skipped), refresh=False)
                bar.update()
            _warn(index, folder)
            if not index.recordings:
                writer.forget()
                raise MisconfigurationException(
                    f"None of the {len(recordings)} recordings under {root} could be read. The reasons are in "
                    f"{folder / REPORT}."
                )
            _write_report(folder, index, len(recordings))
            assert all(recording.path in index.files for recording in recordings), "a recording was lost"
            writer.finish()
    except BaseException:
        with suppress(OSError):  # of a full disk, for one, which is what is being raised
            _write_report(folder, index, len(recordings))
        raise
    hours = index.rows / SAMPLING_RATE / 3600
    rank_zero_info(f"Cached {len(index.recordings)} recordings in {folder} ({hours:.1f} hours).")


class _Writer:
    """Appends recordings to the array and then to the index, and keeps ``index`` up to date."""

    def __init__(self, samples: int, journal: int, index: CacheIndex) -> None:
        self.index = index
        self._samples = samples
        self._journal = journal

    def __enter__(self) -> _Writer:
        self._cut()
        if not self.index.size:
            self._append(settings_line())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._cut()

    def add(self, recording: Recording, stamp: Stamp, result: Preprocessed) -> None:
        if result.samples is None:
            self._append(skipped_line(recording.path, stamp, result.reason))
            self.index.skipped[recording.path] = result.reason
        else:
            cached = CachedRecording(**asdict(recording), start=self.index.rows, samples=len(result.samples))
            _write(self._samples, result.samples, cached.start * ROW_BYTES)
            os.fsync(self._samples)
            self._append(cached_line(cached, stamp, result.clipped))
            self.index.recordings.append(cached)
            self.index.clipped += result.clipped
        self.index.files[recording.path] = stamp

    def finish(self) -> None:
        self._append(last_line())

    def forget(self) -> None:
        """Begin anew the next time."""
        self.index.size = 0

    def _append(self, line: bytes) -> None:
        _write(self._journal, np.frombuffer(line, dtype=np.uint8))
        os.fsync(self._journal)
        self.index.size += len(line)

    def _cut(self) -> None:
        """Remove what a kill or a full disk left unfinished behind the last recording and the last line."""
        os.ftruncate(self._samples, self.index.rows * ROW_BYTES)
        os.ftruncate(self._journal, self.index.size)


def _write(descriptor: int, content: npt.NDArray[np.generic], offset: int | None = None) -> None:
    """Write all of it; one call may write less, on a disk that is nearly full for one."""
    left = np.ascontiguousarray(content).view(np.uint8).reshape(-1).data
    while left:
        written = os.write(descriptor, left) if offset is None else os.pwrite(descriptor, left, offset)
        offset = None if offset is None else offset + written
        left = left[written:]


def _warn(index: CacheIndex, folder: Path) -> None:
    if index.skipped:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in sorted(index.skipped.items())[:10])
        more = f"\n  and {len(index.skipped) - 10} more, in {folder / REPORT}" if len(index.skipped) > 10 else ""
        warnings.warn(f"{len(index.skipped)} recordings were left out:{reasons}{more}", stacklevel=4)
    if index.clipped:
        warnings.warn(
            f"{index.clipped} of {index.rows * len(CHANNELS)} samples are beyond the range of fp16 and were cut to "
            f"±{MAX:g}.",
            stacklevel=4,
        )


def _write_report(folder: Path, index: CacheIndex, recordings: int) -> None:
    lines = [f"{len(index.skipped)} of {recordings} recordings were left out."]
    lines += [f"{path}: {reason}" for path, reason in sorted(index.skipped.items())]
    replace_file(folder / REPORT, lambda file: file.write(("\n".join(lines) + "\n").encode()))
