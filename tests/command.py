"""Running the command line as a process, as a user does."""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
Done = subprocess.CompletedProcess[str]
NO_CHANGE: Mapping[str, str | None] = {}


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
        """Run ``lightning-stability`` with ``words`` in ``cwd``, or Python if the words are ``-c`` and a program.

        Args:
            words: The words of the command line.
            cwd: The working folder.
            env: Variables of the environment to change; None takes one out.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps([words, str(cwd), folder, dict(env)]), file=self._server.stdin, flush=True)
            status = int(self._server.stdout.readline())
            out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
        return Done([*words], status, out, err)

    def close(self) -> None:
        """End the process that the others are forked off."""
        self._server.communicate()


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}


def _serve() -> None:
    import torch.utils.tensorboard  # noqa: F401 - each run with a logger would import it anew

    from lightning_stability.cli import main

    gc.freeze()  # so that a child's collector does not go through all that was imported
    for line in sys.stdin:
        words, cwd, folder, env = json.loads(line)
        child = os.fork()
        if child == 0:
            for name, descriptor in (("out", 1), ("err", 2)):
                os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
            os.chdir(cwd)
            for name in [name for name, value in env.items() if value is None]:
                os.environ.pop(name, None)
            os.environ.update({name: value for name, value in env.items() if value is not None})
            _run_and_exit(main, words)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


def _run_and_exit(main: Callable[[], int], words: list[str]) -> NoReturn:
    """End as `sys.exit` does, but without taking torch apart in memory, which takes longer than most commands."""
    status: object = 0
    try:
        if words[:1] == ["-c"]:
            exec(compile(words[1], "<-c>", "exec"), {"__name__": "__main__"})
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
