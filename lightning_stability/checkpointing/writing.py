"""Writing a checkpoint so that a kill, a full disk or a lost disk leaves every listed file loadable.

The order is what makes it so: the new one is put in place (`atomic.py` says how); then `last`; then the old ones go.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.cloud_io import get_filesystem

from lightning_stability import atomic
from lightning_stability.atomic import is_part as is_part


@dataclass
class WriteJob:
    """One checkpoint to write, and what follows when it is there."""

    path: str
    write: Callable[[str], None] | None = None
    """Writes the checkpoint to the path that it is given; None if it is there already."""
    last_path: str | None = None
    """A second name for it, or None."""
    link: bool = False
    """Whether that is a symbolic link."""
    outdated: list[str] = field(default_factory=list)
    """What is deleted after it; when the job is done, what was."""
    trouble: Exception | None = None
    """Why, with the checkpoint in place, `last` was not switched or an old one not deleted."""


def run(job: WriteJob) -> None:
    """Write the checkpoint, switch `last`, delete the old ones, in that order and on the disk.

    Raises:
        OSError: If the checkpoint could not be written. What fails after that is `job.trouble`.
    """
    if job.write is not None:
        job.write(job.path)
    outdated, job.outdated = job.outdated, []
    try:
        if job.last_path is not None:
            _switch_last(job.path, job.last_path, job.link)
    except Exception as error:
        job.trouble = error
        return  # a link may lead to an old one
    for path in outdated:
        try:
            delete(path)
            job.outdated.append(path)
        except Exception as error:
            job.trouble = error


def write_file(state: Any, path: str) -> None:
    """`torch.save`, in one piece or not at all, and without a copy in memory.

    Args:
        path: Local, or any that fsspec knows. The folder is made if it is missing.

    Raises:
        DiskFullError: If there is no room; it says how much was needed.
        OSError: If it cannot be written. The file that was there is as it was.
    """
    if is_local(path):
        atomic.replace_file(path, lambda file: torch.save(state, file), _check_archive)
        return
    filesystem = get_filesystem(path)
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with filesystem.transaction, filesystem.open(path, "wb") as file:
        torch.save(state, file)


def delete(path: str) -> None:
    """Delete a checkpoint, a file or a folder, if it is there."""
    if not is_local(path):
        filesystem = get_filesystem(path)
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)
    else:
        atomic.delete(Path(path))


def remove_parts(folder: str) -> None:
    """Delete what killed processes of this machine left half written."""
    if is_local(folder):
        atomic.remove_parts(Path(folder))


def is_local(path: str) -> bool:
    """Whether a path is one of this machine's."""
    return "://" not in path


def without_protocol(path: str) -> str:
    """A path of this machine as the operating system knows it; others as they are."""
    return path.removeprefix("file://").removeprefix("local://")


class Writer:
    """Runs one job at a time, here or in the background.

    Args:
        in_background: Whether `submit` returns before the job is done.
    """

    def __init__(self, in_background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._running: Future[None] | None = None

    def submit(self, job: WriteJob, ready: Callable[[], None] = lambda: None) -> None:
        """Start a job; the one before it must have been waited for.

        Args:
            ready: Waits until what is to be written is complete.
        """
        assert self._running is None, "one checkpoint at a time"

        def work() -> None:
            ready()
            run(job)

        if self._pool is not None:
            self._running = self._pool.submit(work)
            return
        self._running = Future()
        try:
            work()
        except Exception as error:
            self._running.set_exception(error)
        else:
            self._running.set_result(None)

    def wait(self) -> BaseException | None:
        """Wait for the job under way; return what it failed with."""
        running, self._running = self._running, None
        return None if running is None else running.exception()

    def close(self) -> None:
        """End the background thread."""
        if self._pool is not None:
            self._pool.shutdown()


def _switch_last(path: str, last: str, link: bool) -> None:
    if not is_local(path):
        get_filesystem(path).copy(path, last)
        return
    place = Path(last)
    if link or Path(path).is_dir():
        target = os.path.relpath(path, place.parent)
        atomic.put_in_place(place, lambda part: part.symlink_to(target))
        return
    try:
        atomic.put_in_place(place, lambda part: os.link(path, part))  # costs no bytes and outlives the other name
    except OSError:  # a file system without hard links
        atomic.put_in_place(place, lambda part: shutil.copyfile(path, part))


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise OSError(f"{path} was not written whole")
