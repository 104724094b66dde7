"""How this package writes a file: beside, flushed to the disk, checked, then moved into place.

A kill, a full disk or a failing one leaves the old file as it was. Nothing is written over in place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from lightning_stability.processes import is_alive

_PART = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]+)-(?P<pid>\d+)\.part$")
_BUFFER = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
    """A file does not fit on the disk.

    Args:
        path: The file, or a folder.
        needed: Its bytes; None where they are not known.
        free: The bytes that are free.
    """

    def __init__(self, path: Path, needed: int | None, free: int) -> None:
        super().__init__(errno.ENOSPC, "the disk is full", str(path))
        self.needed, self.free = needed, free

    def __str__(self) -> str:
        needed = "" if self.needed is None else f"{self.needed / 1e6:,.1f} MB needed, "
        words = f"the disk is full: {needed}{self.free / 1e6:,.1f} MB free"
        if self.needed is not None and self.needed < self.free:
            words += "; so it is a quota, or the number of files, that is used up"
        return words

    __repr__ = __str__


def replace_file(
    path: str | os.PathLike[str], write: Callable[[IO[bytes]], object], check: Callable[[Path], object] | None = None
) -> None:
    """Write a whole file of this machine, in place of the one that is there. Its folder is made if it is missing.

    Args:
        write: Writes to an open file. On a full disk it is called again to count the bytes that it needs.
        check: Looks at the file before it gets its name; raises if something is wrong.

    Raises:
        DiskFullError: If there is no room for it.
        OSError: If it cannot be written, or a folder has its name. What was there is as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> replace_file(path, lambda file: file.write(b"first"))
        >>> replace_file(path, lambda file: file.write(b"second"))
        >>> path.read_bytes()
        b'second'
    """
    path = Path(path)

    def make(part: Path) -> None:
        with part.open("wb", buffering=_BUFFER) as file:
            write(file)
            size = file.tell()
        if (there := part.stat().st_size) != size:
            raise OSError(errno.EIO, f"{there} of {size} bytes were written", str(path))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(path, make, check, replaces_folder=False)
    except DiskFullError as error:
        raise DiskFullError(path, _bytes_needed(write), error.free) from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFullError(path, _bytes_needed(write), _free(path)) from error


def put_in_place(
    path: Path,
    make: Callable[[Path], object],
    check: Callable[[Path], object] | None = None,
    replaces_folder: bool = True,
) -> None:
    """Make a file, a folder or a link beside its place, flush it, check it, and move it there.

    Args:
        make: Makes it under the name that it is given, on the same file system.
        check: Looks at it before it is moved; raises if something is wrong.
        replaces_folder: Whether a folder that is there, with something in it, is replaced; else it is an OSError.

    Raises:
        DiskFullError: If there is no room for it.
        OSError: If it cannot be made. What was there is as it was.
    """
    part = part_path(path)
    try:
        delete(part)
        make(part)
        move_into_place(part, path, check, replaces_folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            delete(part)
        cause = _os_error(error) if isinstance(error, Exception) else None
        if cause is None or isinstance(cause, DiskFullError):
            raise
        if cause.errno in _FULL:
            raise DiskFullError(path, None, _free(path)) from error
        raise cause from error  # torch hides it behind an error of its own


def part_path(path: Path) -> Path:
    """The name under which this process makes what is to become `path`."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.part")


def move_into_place(
    part: Path, path: Path, check: Callable[[Path], object] | None = None, replaces_folder: bool = True
) -> None:
    """Flush and check what was made under `part_path`, and move it into place.

    Use `put_in_place` where this process makes it alone.
    """
    if not part.is_symlink():
        for inner in (*part.rglob("*"), part):
            _flush(inner)
    if check is not None:
        check(part)
    if replaces_folder and path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)  # nothing replaces a folder at once
    try:
        os.replace(part, path)  # noqa: PTH105 - tests watch the calls that change the disk
    except OSError:
        if os.path.lexists(part):  # else it was moved: a network's file system may have been asked twice
            raise
    _flush(path.parent)


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there. A folder is first made a part, so that a kill leaves no half of it."""
    if path.is_dir() and not path.is_symlink():
        if not is_part(path.name):
            part = part_path(path)
            if not part.exists():
                path = path.rename(part)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_part(name: str) -> bool:
    """Whether a file's name is that of one being written."""
    return _PART.match(name) is not None


def remove_parts(folder: Path) -> None:
    """Delete what killed processes of this machine left half written."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = _PART.match(path.name)
        if match and match["host"] == _host() and not _is_being_written(path, int(match["pid"])):
            with contextlib.suppress(OSError):
                delete(path)


def create(path: Path, content: bytes) -> None:
    """Make a file unless it is there. Of several processes that do so one succeeds, and none finds half of it.

    Raises:
        OSError: If it cannot be written.
    """
    if os.path.lexists(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(path)
    try:
        part.write_bytes(content)
        _flush(part)
        try:
            os.link(part, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not os.path.lexists(path):
                os.replace(part, path)  # noqa: PTH105 - tests watch the calls that change the disk
    finally:
        part.unlink(missing_ok=True)


def append(path: Path, line: bytes) -> None:
    """Append a line, in one call, so that lines of several processes do not mix.

    A half line that a killed process or a full disk has left there stays a line of its own.

    Raises:
        OSError: If it was not written, or not all of it.
    """
    # not blocking: a named pipe that nobody reads would hold the run
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o644)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size:
            os.lseek(descriptor, -1, os.SEEK_END)
            line = line if os.read(descriptor, 1) == b"\n" else b"\n" + line
        written = os.write(descriptor, line)
        if written < len(line):
            if os.fstat(descriptor).st_size == status.st_size + written:  # nobody else has written since
                os.ftruncate(descriptor, status.st_size)
            raise OSError(errno.ENOSPC, "a line was cut short", str(path))
    finally:
        os.close(descriptor)


class _Counter:
    """A file that counts what is written to it."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.count += size
        return size

    def flush(self) -> None:
        pass


def _bytes_needed(write: Callable[[IO[bytes]], object]) -> int:
    counter = _Counter()
    with contextlib.suppress(Exception):  # what was counted until then is the answer
        write(counter)  # type: ignore[arg-type]
    return counter.count


def _free(path: Path) -> int:
    """The bytes that are free where a file was to be."""
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    return shutil.disk_usage(folder).free


def _os_error(error: BaseException | None) -> OSError | None:
    """What the operating system said, behind an error that followed from it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
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
