"""Running the command line as a process, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(*words: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``lightning-stability`` with ``words`` in ``cwd``."""
    return run_python("-m", "lightning_stability", *words, cwd=cwd, timeout=timeout)


def run_python(*words: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run Python with ``words`` in ``cwd``, with this checkout first on its path."""
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]), "COLUMNS": "200"}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
