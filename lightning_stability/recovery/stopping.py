"""Ending a run so that nothing good is lost: which checkpoint is the last good one, and that none replaces it."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from lightning_stability._compat import is_instance_by_name

_SAVING_HOOKS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end")
FILE_NAME = "nan_early_stop.ckpt"


class SilencedCheckpoints:
    """Keeps the Trainer's checkpoint callbacks from saving until `restore`.

    Lightning ends a run with a last save, which would replace the one from before the incident.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._callbacks = list(trainer.checkpoint_callbacks)
        for callback in self._callbacks:
            for hook in _SAVING_HOOKS:
                setattr(callback, hook, _nothing)

    def restore(self) -> None:
        """Let them save again."""
        for callback in self._callbacks:
            for hook in _SAVING_HOOKS:
                if vars(callback).get(hook) is _nothing:
                    delattr(callback, hook)
        self._callbacks = []


class EndOfLoop:
    """Calls a function where a loop of the Trainer would begin with the end of an epoch or a batch, until `restore`.

    Args:
        loop: `fit_loop` for an epoch's end, `fit_loop.epoch_loop` for a batch's.
        instead: What to call; it may raise StopIteration, which ends the loop.
    """

    def __init__(self, loop: Any, instead: Callable[[], None]) -> None:
        self._loop = loop
        self._instead = lambda *args: instead()
        self._before = vars(self._loop).get("on_advance_end")  # another callback's, maybe
        self._loop.on_advance_end = self._instead

    def restore(self) -> None:
        """Let them end again."""
        if vars(self._loop).get("on_advance_end") is not self._instead:
            return
        if self._before is None:
            del self._loop.on_advance_end
        else:
            self._loop.on_advance_end = self._before


def newest_checkpoint(trainer: Any) -> str | None:
    """The checkpoint that this run wrote last, or else the one that it was resumed from.

    Args:
        trainer: The Trainer. Only its `ModelCheckpoint`s know what they wrote.
    """
    paths: list[str] = []
    for callback in trainer.checkpoint_callbacks:
        if is_instance_by_name(callback, "ModelCheckpoint"):
            paths += [callback.last_model_path, callback.best_model_path, *callback.best_k_models]
            paths.append(callback._last_checkpoint_saved)
    dated = [(_modified(path), path) for path in dict.fromkeys(paths) if path]
    written = [(date, path) for date, path in dated if date is not None]
    if written:
        return max(written)[1]
    resumed_from = trainer.ckpt_path
    return str(resumed_from) if resumed_from and _modified(str(resumed_from)) is not None else None


def checkpoint_folder(trainer: Any) -> str | None:
    """Where the run's checkpoints go, on whatever file system; None if it keeps none.

    Args:
        trainer: The Trainer.
    """
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folder = next((folder for folder in folders if folder is not None), None)
    return None if folder is None or trainer.fast_dev_run else str(folder).rstrip("/")


def _modified(path: str) -> float | None:
    """When a file was written, in seconds; None if it is not there."""
    files, name = url_to_fs(path)
    if not files.exists(name):
        return None
    try:
        return float(files.modified(name).timestamp())
    except NotImplementedError:  # a file system without dates
        return 0.0


def resume_command(checkpoint: str) -> str:
    """What to type in order to go on from a checkpoint.

    Args:
        checkpoint: Its path.
    """
    words = sys.argv[1:]
    if "fit" not in words:
        return f"trainer.fit(model, ckpt_path={checkpoint!r})"
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in ("--ckpt_path", "--fit.ckpt_path"):
            skip = True
        elif not word.startswith(("--ckpt_path=", "--fit.ckpt_path=")):
            kept.append(word)
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        start = ["python", "-m", program.parent.name]
    else:
        found = shutil.which(program.name) is not None
        start = ["python", str(program)] if program.suffix == ".py" else [program.name if found else str(program)]
    return shlex.join([*start, *kept, f"--ckpt_path={checkpoint}"])


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for a hook."""
