"""What a diagnosis can fail with."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import torch

_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""What torch says where the host has no more."""


class DiagnosisError(Exception):
    """A step cannot be diagnosed; the message says why and what to do.

    Example:
        >>> from lightning_stability.diagnosis import read_incident
        >>> try:
        ...     read_incident("no_such_folder")
        ... except DiagnosisError as error:
        ...     print(str(error).split(":")[0])
        no_such_folder is no incident folder
    """


class OutOfTimeError(DiagnosisError):
    """The time given for a diagnosis is up."""

    def __init__(self) -> None:
        super().__init__("the time given for the diagnosis was up")


@contextlib.contextmanager
def memory_for(what: str) -> Iterator[None]:
    """A lack of memory, of the host or a device, is said in one sentence, whatever was made of it on the way.

    Args:
        what: What it is needed for, such as `"run the step again"`.
    """
    try:
        yield
    except Exception as error:
        if not _lacks_memory(error):
            raise
        raise DiagnosisError(f"there was not enough memory to {what}") from error


def _lacks_memory(error: BaseException | None) -> bool:
    if error is None:
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return said or _lacks_memory(error.__cause__)
