"""Environments in which the built wheel is really installed, or really is not, made in seconds and without a network.

Each is a venv whose site-packages links to everything in ours but this package.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.command import Done

ROOT = Path(__file__).parents[2]
HIDDEN = ("lightning_stability", "lightning-stability", "__editable__")
VARIABLE = "LIGHTNING_STABILITY_CALLBACKS"


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and from it the wheel, out of a copy of the checkout, so that nothing is left behind in it."""
    source = folder / "source"
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def tracked_files() -> list[str]:
    """The files of the repository, new ones included, less those that git ignores."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted({name for name in listed if (ROOT / name).is_file()})


class Environment:
    """A venv, and a process in it that has imported both Lightnings and forks one child for each script.

    Args:
        folder: Where to make it.
        wheel: What to install; None for nothing.
        without: Packages of ours that it shall not have.
    """

    def __init__(self, folder: Path, wheel: Path | None = None, without: Sequence[str] = ()) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.bin = folder / "bin"
        self.python = str(self.bin / "python")
        theirs = next((folder / "lib").glob("python*")) / "site-packages"
        ours = Path(sysconfig.get_paths()["purelib"])
        left_out = {f"{name}{rest}" for name in without for rest in ("", "-2.6.6.dist-info")}
        for entry in ours.iterdir():
            if not entry.name.startswith(HIDDEN) and entry.name not in left_out:
                (theirs / entry.name).symlink_to(entry)
        if wheel is not None:
            self.install(wheel)
        self._server: subprocess.Popen[str] | None = None

    def install(self, wheel: Path) -> None:
        """Install it, and nothing that it needs."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)

    def run(self, *words: str, cwd: Path, automatic: str | None = None, timeout: float = 300) -> Done:
        """Run a program of the environment in a process of its own."""
        command = [str(self.bin / words[0]), *words[1:]]
        env = environment_variables(automatic)
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)

    def __call__(self, script: str, cwd: Path, automatic: str | None = None) -> Done:
        """Run a script in a fork of the server.

        Args:
            script: Python; what it prints comes back.
            cwd: Its working folder.
            automatic: Value of the environment variable; None for unset.
        """
        if self._server is None:
            self._server = subprocess.Popen(
                [self.python, "-c", f"{inspect.getsource(_serve)}\n_serve()"],
                env=environment_variables(None),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps([script, str(cwd), folder, automatic]), file=self._server.stdin, flush=True)
            status = int(self._server.stdout.readline())
            out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
        return Done([script], status, out, err)

    def close(self) -> None:
        """End the process that the others are forked off."""
        if self._server is not None:
            self._server.communicate()


def environment_variables(automatic: str | None) -> dict[str, str]:
    """Ours, less what would show the checkout to the environment."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", VARIABLE)}
    return env if automatic is None else {**env, VARIABLE: automatic}


def _serve() -> None:
    import atexit
    import contextlib
    import gc
    import json
    import os
    import sys
    import threading
    import traceback

    import pytorch_lightning
    import pytorch_lightning.cli  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401 - each script with a logger would import it anew

    with contextlib.suppress(ImportError):
        import lightning.pytorch
        import lightning.pytorch.cli  # noqa: F401
    assert "lightning_stability" not in sys.modules
    gc.freeze()  # so that a child's collector does not go through all that was imported
    for line in sys.stdin:
        script, cwd, folder, automatic = json.loads(line)
        child = os.fork()
        if child == 0:
            for name, descriptor in (("out", 1), ("err", 2)):
                os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
            os.chdir(cwd)
            if automatic is not None:
                os.environ["LIGHTNING_STABILITY_CALLBACKS"] = automatic
            failed = 0
            try:
                exec(compile(script, "script", "exec"), {"__name__": "__main__"})
            except SystemExit as end:
                failed = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
                failed = 1
            # as an interpreter ends, but without taking torch apart in memory, which takes longer than most scripts
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(failed)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)
