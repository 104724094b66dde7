"""`lightning-stability checkpoints FOLDER --replay N`: the steps after a save once more, without writing anything."""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.cli import LightningCLI

from lightning_stability._compat import Callback, MisconfigurationException, is_instance_by_name
from lightning_stability.callbacks.base import SessionMember
from lightning_stability.callbacks.proof_messages import sentence
from lightning_stability.callbacks.resume_proof import ProvesResume, ResumeProof
from lightning_stability.checkpointing.fingerprints import Comparison, Window, fingerprint_file, read_window, save_name
from lightning_stability.checkpointing.listing import (
    checkpoint_folders,
    list_checkpoints,
    newest_good,
    oldest_first,
    shown,
)
from lightning_stability.checkpointing.loops import SavePoint, SavePoints
from lightning_stability.checkpointing.own_objects import allow_own_hyperparameters
from lightning_stability.checkpointing.resume import SECTION
from lightning_stability.checkpointing.sharded import is_sharded, read_rest
from lightning_stability.events import EventLog

Run = tuple[Any, Any, Any]
"""A module, its data, and a Trainer that is to train it."""
_NOT_OF_A_TRAINER = ("ckpt_path", "weights_only", "return_predictions", "verbose")

_LOGGERS = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")


class _EnoughError(Exception):
    """As many steps as were asked for."""


class _Memory:
    """Keeps fingerprints, where a run writes them to a file."""

    def __init__(self) -> None:
        self.window: Window | None = None

    def begin(self, window: Window) -> None:
        self.window = window

    def add(self, n: int, fields: dict[str, Any]) -> None:
        assert self.window is not None
        self.window.rows.setdefault(n, {}).update(fields)


class _Replay(ProvesResume, SessionMember, Callback):
    """Takes FractionalCheckpoint's place: puts the run where it was saved, saves nothing, and ends it after N steps."""

    reads_steps = False

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.memory = _Memory()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the module's own hyperparameters load."""
        allow_own_hyperparameters(pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep what is restored when training starts."""
        SavePoints.of(trainer).resume_from(checkpoint, trainer.global_rank, trainer.world_size)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen for where the resumed run is put."""
        SavePoints.of(trainer).listen(self)
        drain = self.session.drain if self.session is not None else _nothing
        self._proof = ResumeProof(EventLog(None), drain, self.memory, self.steps)

    def on_resumed(self, trainer: Any) -> None:
        """The steps that follow are those after the save."""
        assert self._proof is not None
        self._proof.begin(trainer, "replay")

    def on_place(self, trainer: Any, place: SavePoint) -> None:
        """Nothing is saved."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End it after the last step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        window = self.memory.window
        if window is not None and self.steps in window.rows:
            if self.session is not None:
                self.session.drain()
            raise _EnoughError

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the Trainer as it was."""
        SavePoints.of(trainer).leave(self)


def replay(folder: Path, steps: int, factory: str | None) -> int:
    """Train the steps after a save again, twice, and say whether they were the same; the status is 1 if not.

    Args:
        folder: A checkpoint, or where the newest good one is looked for.
        factory: `package.module:function`, which gives a module, its data and, if wanted, options of the Trainer.

    Raises:
        MisconfigurationException: If there is nothing to replay, or the module and data cannot be made again.
    """
    if steps < 1:
        raise MisconfigurationException(f"--replay {steps}: expected a number of steps, 1 or more")
    path = _checkpoint(folder)
    section = _section(path)
    recorded = read_window(fingerprint_file(path.parent, 0), save_name(section))
    print(f"checkpoint     {shown(str(path))}")
    windows = []
    for _ in range(2):  # one after the other, all made anew
        with tempfile.TemporaryDirectory() as scratch:
            windows.append(_train(path, steps, lambda: _rebuild(path, factory, recorded, Path(scratch))))
    print(f"replayed       {min(window.steps for window in windows)} steps, twice")
    if recorded is None or not recorded.steps:
        against_recorded, same = "nothing: no step was recorded after this save", True
    else:
        against_recorded, same = _compare(recorded, windows[0], section)
    between, deterministic = _compare(windows[0], windows[1], section)
    print(f"with the run   {against_recorded}\nboth times     {between}")
    return 0 if same and deterministic else 1


def _compare(earlier: Window, later: Window, section: dict[str, Any]) -> tuple[str, bool]:
    steps = min(earlier.steps, later.steps)
    comparison = Comparison(earlier, later.header, steps)
    for n in range(1, steps + 1):
        comparison.add(n, later.rows[n])
    difference = comparison.difference()
    if difference is None:
        return f"the same: {steps} of {steps} steps bitwise identical", True
    return sentence(difference, comparison.equal, steps, section["global_step"], None), False


def _checkpoint(folder: Path) -> Path:
    """The newest good one that steps were recorded after; else the newest good one."""
    if folder.is_file() or is_sharded(folder):
        return folder
    infos = oldest_first([i for below in checkpoint_folders(folder) for i in list_checkpoints(below) if i.run])
    for info in reversed(infos):
        with contextlib.suppress(MisconfigurationException):
            followed = read_window(fingerprint_file(info.path.parent, 0), save_name(_section(info.path)))
            if followed is not None and followed.steps and info.is_good:
                return info.path
    path = newest_good(infos)
    if path is None:
        raise MisconfigurationException(f"There is no good checkpoint of FractionalCheckpoint in {folder} or below it.")
    return path


def _section(path: Path) -> dict[str, Any]:
    try:
        rest = read_rest(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {**rest[SECTION], "global_step": rest["global_step"]}
    except Exception as error:  # whatever zip, pickle and torch stumble over
        raise MisconfigurationException(
            f"{path} cannot be replayed: found {type(error).__name__}: {error}; expected a checkpoint that"
            " FractionalCheckpoint has written"
        ) from error


def _train(path: Path, steps: int, make: Callable[[], Run]) -> Window:
    """Resume, train so many steps, and return their fingerprints."""
    observer = _Replay(steps)
    with _quietly():
        module, data, trainer = make()
        trainer.callbacks.append(observer)
        with contextlib.suppress(_EnoughError):
            loaders = {"datamodule": data} if is_instance_by_name(data, "LightningDataModule") else {}
            trainer.fit(module, **(loaders or {"train_dataloaders": data}), ckpt_path=str(path))
    if observer.memory.window is None or not observer.memory.window.rows:
        raise MisconfigurationException(f"No step follows {path}: the run was at its end, or it cannot be resumed here")
    return observer.memory.window


def _rebuild(path: Path, factory: str | None, recorded: Window | None, scratch: Path) -> Run:
    if factory is not None:
        return _from_factory(factory, recorded, scratch)
    config = next((f for f in (path.parent.parent / "config.yaml", path.parent / "config.yaml") if f.is_file()), None)
    if config is None:
        raise MisconfigurationException(
            f"How the run of {path} was made is not known: there is no config.yaml of Lightning's command line beside"
            " its checkpoints. Give a function that returns the module and its data (a data module or a loader):"
            " --module package.module:function"
        )
    return _from_config(config, scratch)


def _from_factory(factory: str, recorded: Window | None, scratch: Path) -> Run:
    module_name, colon, name = factory.partition(":")
    if not colon or not name:
        raise MisconfigurationException(f"--module {factory}: expected package.module:function")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise MisconfigurationException(f"--module {factory} cannot be imported: {error}") from error
    torch.manual_seed(0)  # so that what it draws is the same both times
    made = function()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise MisconfigurationException(
            f"--module {factory}: found a {type(made).__name__}; expected (module, data) or (module, data, options of"
            " the Trainer)"
        )
    module, data, given = (*made, {})[:3]
    names = [base.__module__ for base in type(module).__mro__]
    lightning = "lightning.pytorch" if any(n.startswith("lightning.pytorch") for n in names) else "pytorch_lightning"
    options = {**(recorded.header.get("trainer", {}) if recorded is not None else {}), **given}
    return module, data, importlib.import_module(lightning).Trainer(**{"devices": 1, **options, **_silent(scratch)})


def _from_config(config: Path, scratch: Path) -> Run:
    """As Lightning's command line made it, less what writes."""
    try:
        given = yaml.safe_load(config.read_text())
        given = {name: value for name, value in given.items() if name not in _NOT_OF_A_TRAINER}
        trainer = given["trainer"]
        trainer["callbacks"] = [c for c in trainer.get("callbacks") or [] if not _saves(c["class_path"])]
        given["trainer"] = {**trainer, **_silent(scratch)}
        cli = LightningCLI(args=given, run=False, save_config_callback=None)
    except Exception as error:  # whatever the parser and the user's classes raise
        raise MisconfigurationException(
            f"The run cannot be made again as {config} says: {type(error).__name__}: {error}. Give a function that"
            " does: --module package.module:function"
        ) from error
    return cli.model, cli.datamodule, cli.trainer


def _silent(scratch: Path) -> dict[str, Any]:
    """Options of a Trainer that leaves nothing behind."""
    return {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(scratch),
    }


def _saves(class_path: str) -> bool:
    module, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    needs_logger = name == "LearningRateMonitor"
    return needs_logger or issubclass(cls, Checkpoint) or any(base.__name__ == "Checkpoint" for base in cls.__mro__)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what Lightning says of each Trainer, and of a callback that is missing on purpose."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _nothing() -> None:
    pass
