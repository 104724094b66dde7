"""Whether a process of this machine that wrote something down is still there."""

from __future__ import annotations

import os
import time
from pathlib import Path

_CLOCK_CHANGE = 60.0
"""Seconds by which a clock may have been set in between."""


def is_alive(pid: int, started_before: float) -> bool:
    """Whether a process of this machine runs; another one that was given the same number later does not count.

    Args:
        started_before: A time at which it was running, in seconds since 1970.

    Example:
        >>> import os, time
        >>> is_alive(os.getpid(), started_before=time.time())
        True
    """
    if os.name == "nt":
        return True  # there os.kill(pid, 0) would send it a Ctrl-C
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no Linux, or gone by now
        return True
    # (not /proc/uptime, which in some containers is the container's, while processes count from the machine's boot)
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    began = booted + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return fields[0] != "Z" and began < started_before + _CLOCK_CHANGE


def free_host_memory() -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
