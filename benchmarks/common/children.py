"""A process of its own for what shall leave nothing behind, forked off this one."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Child:
    """A forked process that runs a function and hands over what it returns.

    Args:
        run: Returns what JSON can hold. Nothing that it prints is seen.
    """

    def __init__(self, run: Callable[[], dict[str, Any]]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "result.json"
        self._process = os.fork()
        if self._process == 0:
            self._work(run)

    def _work(self, run: Callable[[], dict[str, Any]]) -> None:
        warnings.simplefilter("ignore")
        with contextlib.suppress(BaseException), Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
            try:
                result = run()
            except BaseException as error:
                result = {"raised": f"{type(error).__name__}: {error}"[:160]}
            self._path.write_text(json.dumps(result))
        os._exit(0)

    def result(self) -> dict[str, Any]:
        """What it returned, `raised`, or `killed` with its exit code."""
        status = os.waitpid(self._process, 0)[1]
        with self._folder:
            if self._path.exists() and self._path.stat().st_size:
                found: dict[str, Any] = json.loads(self._path.read_text())
                return found
        return {"killed": os.waitstatus_to_exitcode(status)}


def in_a_child(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it returned, or how it died.

    Args:
        run: As for `Child`.
    """
    return Child(run).result()
