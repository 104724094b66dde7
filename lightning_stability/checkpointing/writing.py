"""Writing a checkpoint so that a kill, a full disk or a lost disk leaves every listed file loadable.

The order is what makes it so: beside, flushed to the disk, moved into place; then `last`; then the old ones go.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.cloud_io import get_filesystem

from lightning_stability.processes import is_alive

_PART = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]+)-(?P<pid>\d+)\.part$")


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
    """What is deleted after it."""


def run(job: WriteJob) -> None:
    """Write the checkpoint, switch `last`, delete the old ones, in that order and on the disk.

    Args:
        job: What to do.
    """
    if not is_local(job.path):
        _run_remotely(job)
        return
    path = Path(job.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write = job.write
    if write is not None:
        _into_place(path, lambda part: write(str(part)))
    if job.last_path is not None:
        _switch_last(path, Path(job.last_path), job.link)
    for outdated in job.outdated:
        delete(outdated)


def write_file(state: Any, path: str) -> None:
    """`torch.save` without a copy in memory, for `WriteJob.write`.

    Args:
        state: What to save.
        path: Local, or any that fsspec knows.
    """
    if is_local(path):
        torch.save(state, path)
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
    elif Path(path).is_dir() and not Path(path).is_symlink():
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def remove_parts(folder: str) -> None:
    """Delete what killed processes of this machine left half written.

    Args:
        folder: Where checkpoints are written.
    """
    if not is_local(folder) or not Path(folder).is_dir():
        return
    for path in Path(folder).iterdir():
        match = _PART.match(path.name)
        if match and match["host"] == _host() and not _is_being_written(path, int(match["pid"])):
            delete(str(path))


def is_part(name: str) -> bool:
    """Whether a file's name is that of one being written."""
    return _PART.match(name) is not None


def is_local(path: str) -> bool:
    """Whether a path is one of this machine's."""
    return "://" not in path


def without_protocol(path: str) -> str:
    """A path of this machine as the operating system knows it; others as they are."""
    return path.removeprefix("file://").removeprefix("local://")


def free_space(folder: str) -> str:
    """What is left on the disk, in words; nothing where it cannot be known."""
    try:
        return f"; {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there" if is_local(folder) else ""
    except OSError:  # it is gone
        return ""


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
            job: What to do.
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


def _run_remotely(job: WriteJob) -> None:
    # An object store shows a file only when it is whole.
    if job.write is not None:
        job.write(job.path)
    if job.last_path is not None:
        get_filesystem(job.path).copy(job.path, job.last_path)
    for outdated in job.outdated:
        delete(outdated)


def _into_place(path: Path, make: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.{_host()}-{os.getpid()}.part")
    try:
        delete(str(part))
        make(part)
        if not part.is_symlink():
            _flush(part)
        os.replace(part, path)  # noqa: PTH105 - tests watch the calls that change the disk
    except BaseException:
        with contextlib.suppress(OSError):
            delete(str(part))
        raise
    _flush(path.parent)


def _switch_last(path: Path, last: Path, link: bool) -> None:
    if last.is_dir() and not last.is_symlink():
        shutil.rmtree(last)  # a sharded checkpoint; nothing replaces a folder at once
    if link or path.is_dir():
        target = os.path.relpath(path, last.parent)
        _into_place(last, lambda part: part.symlink_to(target))
        return
    try:
        _into_place(last, lambda part: os.link(path, part))  # costs no bytes and outlives the other name
    except OSError:  # a file system without hard links
        _into_place(last, lambda part: shutil.copyfile(path, part))


def _flush(path: Path) -> None:
    """Have the disk hold a file, or a folder with all that is in it."""
    if path.is_dir():
        for inner in path.iterdir() if is_part(path.name) else ():
            _flush(inner)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def _is_being_written(part: Path, pid: int) -> bool:
    try:
        return is_alive(pid, started_before=part.lstat().st_mtime)
    except FileNotFoundError:  # it has just been moved into place
        return True


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname())
