"""Whether a process lives, as the package tells it."""

import os
import time
from pathlib import Path

import pytest

from lightning_stability.processes import is_alive

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says when a process began")


def test_one_that_was_given_the_number_later_does_not_count() -> None:
    assert is_alive(os.getpid(), started_before=time.time())
    assert not is_alive(os.getpid(), started_before=time.time() - 10**7)


def test_a_container_that_counts_its_uptime_from_its_own_start_makes_no_process_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = Path.read_text
    own = {"/proc/uptime": "1.00 1.00\n"}
    monkeypatch.setattr(Path, "read_text", lambda path, *args: own.get(str(path)) or read(path, *args))
    assert is_alive(os.getpid(), started_before=time.time())
