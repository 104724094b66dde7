"""Recordings, read and turned into fp16 by several processes.

The processes are new interpreters that import this module and nothing of the program that starts them: a script needs
no ``if __name__ == "__main__"``, and no lock or thread of it is copied. Each one holds one end of a socket. When the
other end is closed, as it also is by a kill of the program, it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from lightning_stability.tuab.corpus import Recording, read_recording

MAX = float(np.finfo(np.float16).max)

_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from lightning_stability.tuab.preprocessing import serve
serve(int(sys.argv[1]))
"""
_MOST_PROCESSES = 16  # each one holds a recording several times over in float64
# A process imports for as long as it then needs for about 200 MB of EDF files.
_BYTES_WORTH_A_PROCESS = 200_000_000


@dataclass(frozen=True)
class Preprocessed:
    """What became of a file.

    Args:
        samples: Float16, shape (samples, channels), or None if the file is left out.
        clipped: How many values were beyond the range of fp16.
        reason: Why it is left out.
    """

    samples: npt.NDArray[np.float16] | None
    clipped: int = 0
    reason: str = ""


def preprocess(path: Path) -> Preprocessed:
    """Read one file and cut its values to the range of fp16."""
    try:
        signal = read_recording(path)
    except (ValueError, OSError) as error:
        return Preprocessed(None, reason=str(error) or type(error).__name__)
    clipped = int((np.abs(signal) > MAX).sum())
    if clipped:
        signal = signal.clip(-MAX, MAX)
    return Preprocessed(torch.from_numpy(signal).half().T.contiguous().numpy(), clipped)


def suitable_processes(size: int) -> int:
    """Return how many processes are worth their start for files of ``size`` bytes together."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux knows which ones a process may use
        cores = os.cpu_count() or 1
    return max(1, min(cores, _MOST_PROCESSES, size // _BYTES_WORTH_A_PROCESS))


def preprocess_all(
    root: Path, recordings: Sequence[Recording], processes: int
) -> Generator[tuple[Recording, Preprocessed], None, None]:
    """Preprocess ``recordings``, each as soon as a process is free; yield them in the order in which they are finished.

    Args:
        processes: How many work at once. One is this process itself.

    Raises:
        RuntimeError: If a process ended, was killed for want of memory for example, or met an error that is not the
            file's.
    """
    if processes == 1:
        for recording in recordings:
            yield recording, preprocess(root / recording.path)
        return
    workers: dict[Connection, subprocess.Popen[bytes]] = {}
    busy: dict[Connection, Recording] = {}
    waiting = iter(recordings)
    try:
        for recording in islice(waiting, processes):
            connection, process = _start()
            workers[connection] = process
            _send(connection, root / recording.path)
            busy[connection] = recording
        while busy:
            for ready in wait(list(busy)):
                connection = cast("Connection", ready)
                recording = busy.pop(connection)
                result = _receive(connection, workers[connection], recording)
                following = next(waiting, None)
                if following is not None:  # before the result is used, so that the process does not wait for that
                    _send(connection, root / following.path)
                    busy[connection] = following
                yield recording, result
    finally:
        for connection, process in workers.items():
            connection.close()
            process.kill()
            process.wait()


def _start() -> tuple[Connection, subprocess.Popen[bytes]]:
    ours, theirs = Pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), json.dumps(sys.path)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except OSError as error:
        raise RuntimeError(f"No further process to preprocess recordings could be started: {error}") from error
    finally:
        theirs.close()
    return ours, process


def _send(connection: Connection, path: Path) -> None:
    with contextlib.suppress(OSError):  # it ended; so says what is received from it
        connection.send(path)


def _receive(connection: Connection, process: subprocess.Popen[bytes], recording: Recording) -> Preprocessed:
    try:
        result = connection.recv()
    except (EOFError, OSError) as error:
        raise RuntimeError(
            f"A process that preprocessed {recording.path} ended with status {process.wait()}"
            " (-9: it was killed, often for want of memory)."
        ) from error
    if isinstance(result, str):
        raise RuntimeError(f"Preprocessing {recording.path} failed:\n{result}")
    assert isinstance(result, Preprocessed)
    return result


def serve(descriptor: int) -> None:
    """Preprocess the files whose paths come in, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program that started this one decides
    torch.set_num_threads(1)
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):  # the other end is closed
        while True:
            path = connection.recv()
            try:
                result: Preprocessed | str = preprocess(path)
            except Exception:
                result = traceback.format_exc()
            connection.send(result)
