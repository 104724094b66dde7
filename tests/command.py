"""Running the command line as a process, as a user does."""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
Done = subprocess.CompletedProcess[str]
NO_CHANGE: Mapping[str, str | None] = {}
HANGS = 600.0
"""Seconds after which ranks are given up."""


def run(*words: str, cwd: Path, timeout: float = 300) -> Done:
    """Run ``lightning-stability`` with ``words`` in ``cwd``, in a new interpreter."""
    return run_python("-m", "lightning_stability", *words, cwd=cwd, timeout=timeout)


def run_python(*words: str, cwd: Path, timeout: float = 300) -> Done:
    """Run Python with ``words`` in ``cwd``, with this checkout first on its path."""
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=timeout
    )


class Launcher:
    """Runs the command in processes of their own that are forked off one which has imported it.

    The import takes five seconds, many times what most of the tests look at.
    """

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *words: str, cwd: Path, env: Mapping[str, str | None] = NO_CHANGE) -> Done:
        """Run ``lightning-stability`` with ``words`` in ``cwd``.

        Args:
            words: The words of the command line. If they are ``-c`` and a program, or a script and its words, Python
                runs that.
            cwd: The working folder.
            env: Variables of the environment to change; None takes one out.
        """
        [done] = self._together(words, cwd, [env])
        return done

    def ranks(
        self, *words: str, cwd: Path, count: int = 2, nodes: int = 1, env: Mapping[str, str | None] = NO_CHANGE
    ) -> list[Done]:
        """Run the same in ``count`` processes at once, with the variables that torchrun sets.

        Args:
            words: As of a call.
            cwd: The working folder.
            count: How many.
            nodes: On how many machines they believe to be.
            env: As of a call.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(count)}
        each = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **env} for rank in range(count)]
        if nodes > 1:
            local = count // nodes
            elastic = {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": str(nodes), "LOCAL_WORLD_SIZE": str(local)}
            for rank, variables in enumerate(each):
                variables |= {**elastic, "LOCAL_RANK": str(rank % local), "GROUP_RANK": str(rank // local)}
        return self._together(words, cwd, each, HANGS)

    def _together(
        self, words: Sequence[str], cwd: Path, envs: Sequence[Mapping[str, str | None]], seconds: float | None = None
    ) -> list[Done]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as name:
            folders = [Path(name) / str(number) for number in range(len(envs))]
            for folder in folders:
                folder.mkdir()
            jobs = [[words, str(cwd), str(folder), dict(env)] for folder, env in zip(folders, envs, strict=True)]
            print(json.dumps([jobs, seconds]), file=self._server.stdin, flush=True)
            statuses = json.loads(self._server.stdout.readline())
            said = [[(folder / stream).read_text() for stream in ("out", "err")] for folder in folders]
        return [Done([*words], status, *texts) for status, texts in zip(statuses, said, strict=True)]

    def close(self) -> None:
        """End the process that the others are forked off."""
        self._server.communicate()


@cache
def launcher() -> Launcher:
    """The one of this process; it ends with it."""
    return Launcher()


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}


def _serve() -> None:
    import torch.utils.tensorboard  # noqa: F401 - each run with a logger would import it anew

    from lightning_stability.cli import main

    gc.freeze()  # so that a child's collector does not go through all that was imported
    for line in sys.stdin:
        jobs, seconds = json.loads(line)
        children = [_fork(main, *job) for job in jobs]
        end = None if seconds is None else time.monotonic() + seconds
        statuses = [os.waitstatus_to_exitcode(_wait(child, end)) for child in children]
        print(json.dumps(statuses), flush=True)
    os._exit(0)


def _fork(main: Callable[[], int], words: list[str], cwd: str, folder: str, env: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        for name, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        os.chdir(cwd)
        for name in [name for name, value in env.items() if value is None]:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in env.items() if value is not None})
        _run_and_exit(main, words)
    return child


def _wait(child: int, end: float | None) -> int:
    """Wait for a process, and kill it if it does not end in time; return its status."""
    while end is not None and time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.01)
    if end is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _run_and_exit(main: Callable[[], int], words: list[str]) -> NoReturn:
    """End as `sys.exit` does, but without taking torch apart in memory, which takes longer than most commands."""
    status: object = 0
    try:
        if words[:1] == ["-c"]:
            exec(compile(words[1], "<-c>", "exec"), {"__name__": "__main__"})
        elif words[0].endswith(".py"):
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        else:
            sys.argv = ["lightning-stability", *words]
            status = main()
    except SystemExit as error:
        status = error.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    _serve()
