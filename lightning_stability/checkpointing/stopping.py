"""Ending a run so that nothing good is lost: which checkpoint is the last good one, and that none replaces it."""

from __future__ import annotations

import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs  # type: ignore[import-untyped]

from lightning_stability import internals
from lightning_stability._compat import is_instance_by_name
from lightning_stability.checkpointing.listing import list_checkpoints, oldest_first
from lightning_stability.checkpointing.loops import SavePoints
from lightning_stability.checkpointing.own_objects import needs_pickle
from lightning_stability.checkpointing.sharded import is_sharded
from lightning_stability.checkpointing.verification import what_is_not_finite
from lightning_stability.checkpointing.writing import is_local

_SAVING_HOOKS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end")
FILE_NAME = "nan_early_stop.ckpt"


class SilencedCheckpoints:
    """Keeps the Trainer's checkpoint callbacks from saving until `restore`.

    Lightning ends a run with a last save, which would replace the one from before the incident.
    """

    def __init__(self, trainer: Any) -> None:
        self._overrides = internals.Overrides()
        for callback in trainer.checkpoint_callbacks:
            for hook in _SAVING_HOOKS:
                self._overrides.set(callback, hook, _nothing)

    def restore(self) -> None:
        """Let them save again."""
        self._overrides.restore()


class EndOfLoop:
    """Calls a function where a loop of the Trainer would begin with the end of an epoch or a batch, until `restore`.

    Args:
        loop: `fit_loop` for an epoch's end, `fit_loop.epoch_loop` for a batch's.
        instead: What to call; it may raise StopIteration, which ends the loop.
    """

    def __init__(self, loop: Any, instead: Callable[[], None]) -> None:
        self._overrides = internals.Overrides()
        self._overrides.set(loop, "on_advance_end", lambda *args: instead())

    def restore(self) -> None:
        """Let them end again."""
        self._overrides.restore()


def newest_checkpoint(trainer: Any) -> str | None:
    """The newest good checkpoint of those that this run wrote or was resumed from; it is read for this.

    Args:
        trainer: The Trainer. Only its `ModelCheckpoint`s know what they wrote.
    """
    paths: list[str] = []
    for callback in trainer.checkpoint_callbacks:
        if is_instance_by_name(callback, "FractionalCheckpoint"):
            callback.finish_writing(trainer)  # what is on its way may be the newest
        if is_instance_by_name(callback, "ModelCheckpoint"):
            paths += [callback.last_model_path, callback.best_model_path, *callback.best_k_models]
            paths.append(internals.last_saved(callback))
            if callback.dirpath is not None and is_local(str(callback.dirpath)):
                run = SavePoints.of(trainer).run_id
                paths += [str(info.path) for info in list_checkpoints(callback.dirpath) if info.run == run]
    return next(filter(_is_good, _newest_first([*paths, str(trainer.ckpt_path or "")])), None)


def _newest_first(paths: list[str]) -> list[str]:
    """Files of this machine in the order of the listing, then folders and what other file systems hold, by date."""
    there = [path for path in dict.fromkeys(paths) if path and _modified(path) is not None]
    files = [path for path in there if _is_file(path)]
    names = {str(Path(path)): path for path in files}
    infos = oldest_first([info for path in files for info in list_checkpoints(path)])
    others = sorted((path for path in there if path not in files), key=lambda path: _modified(path) or 0.0)
    return [names[str(info.path)] for info in reversed(infos)] + others[::-1]


def _is_file(path: str) -> bool:
    return is_local(path) and Path(path).is_file()


def _is_good(path: str) -> bool:
    """Whether a file that this run wrote or has loaded is whole and finite, read in this moment."""
    if is_local(path) and not _is_file(path):  # a folder that several ranks wrote
        infos = [info for info in list_checkpoints(Path(path).parent) if info.path == Path(path)]
        return any(info.is_good if is_sharded(info.path) else info.complete for info in infos)
    if _is_file(path) and list_checkpoints(path, verify=True)[0].is_good:
        return True
    try:
        files, name = url_to_fs(path)
        with files.open(name, "rb") as file:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    return False
            if _is_file(path) and not needs_pickle(path):
                return False  # nothing but objects could have kept the listing from reading it
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=False)  # it is this run's own
        return not what_is_not_finite(checkpoint)
    except Exception:  # whatever zip, pickle and torch stumble over
        return False


def checkpoint_folder(trainer: Any) -> str | None:
    """Where the run's checkpoints go, on whatever file system; None if it keeps none."""
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
    """What to type in order to resume from a checkpoint."""
    words = sys.argv[1:]
    if needs_pickle(checkpoint):  # Lightning's command line refuses such a file whatever it is told
        return f"trainer.fit(model, ckpt_path={checkpoint!r}, weights_only=False)"
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
    return shlex.join([*_program(), *kept, f"--ckpt_path={checkpoint}"])


def _program() -> list[str]:
    """How this process was started: a module, a script or a command."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = Path(sys.argv[0])
    if spec is not None and program.suffix == ".py":
        return ["python", "-m", spec.name.removesuffix(".__main__")]
    if program.suffix == ".py":
        return ["python", str(program)]
    return [program.name if shutil.which(program.name) is not None else str(program)]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for a hook."""
