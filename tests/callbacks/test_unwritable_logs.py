"""A log folder in which nothing, or not everything, can be written: the run goes before its records."""

from __future__ import annotations

import contextlib
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_stability import (
    FractionalCheckpoint,
    GradNormMonitor,
    IncidentReport,
    InputCheck,
    NaNEarlyStop,
    SpikeRecovery,
)
from lightning_stability.callbacks.layer_check import FILE_NAME as SCALES
from lightning_stability.events import FILE_NAME as EVENTS
from lightning_stability.events import read_events
from lightning_stability.flagged_inputs import FILE_NAME as FLAGGED
from tests import runs

pl = runs.load_namespace("pytorch_lightning")
OPTIONS = {"full": "size=256k", "read-only": "size=1m", "no more files": "size=1m,nr_inodes=12"}


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "other").open("wb", 0) as file:
        while file.write(b"x" * 512):
            pass


def make_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def use_up_names(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for number in range(100):
            (folder / str(number)).touch()


SPOIL: dict[str, Callable[[Path], object]] = {
    "full": fill,
    "read-only": make_read_only,
    "no more files": use_up_names,
}


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", OPTIONS[request.param], "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class FolderLogger(pl.loggers.logger.DummyLogger):  # type: ignore[name-defined,misc]
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = str(folder)

    @property
    def log_dir(self) -> str:
        return self._folder

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def after_save_checkpoint(self, callback: Any) -> None:
        pass


def train(tmp_path: Path, log: Path, spoil: Callable[[], object] | None = None, error: bool = False) -> list[str]:
    """Train with every callback that writes a record, with bad losses and bad inputs; what was warned of."""
    x = torch.randn(28, 6, generator=torch.Generator().manual_seed(0))
    x[5] = torch.nan

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if error and batch_idx == 6:
            raise KeyError("the user's own")
        loss: Tensor = self.net(batch[0]).pow(2).mean() * (torch.nan if batch_idx in (2, 5) else 1.0)
        return loss

    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0 and trainer.current_epoch == 0 and spoil is not None:
                spoil()

    callbacks = [
        FractionalCheckpoint(dirpath=tmp_path / "checkpoints"),
        NaNEarlyStop(),
        GradNormMonitor(),
        InputCheck(action="skip"),
        SpikeRecovery(),
        IncidentReport(),
    ]
    trainer = runs.trainer(
        pl, callbacks=[*callbacks, Spoil()], max_epochs=2, logger=FolderLogger(log), enable_checkpointing=True
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(runs.make_module(pl, training_step=training_step), DataLoader(TensorDataset(x), 4))
    assert trainer.global_step == 14
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("disk", OPTIONS, indirect=True)
def test_a_log_folders_disk_that_fails_ends_no_run(tmp_path: Path, disk: Path, request: Any) -> None:
    said = train(tmp_path, disk / "run", lambda: SPOIL[request.node.callspec.params["disk"]](disk))
    unwritable = [message for message in said if "cannot be written" in message]
    assert [FLAGGED in message for message in unwritable].count(True) == 1, said
    assert not [message for message in said if "inline_container" in message], "in torch's words"
    assert next(read_events(disk / "run"))["event"] == "training_started"


@pytest.mark.parametrize("disk", OPTIONS, indirect=True)
def test_a_log_folders_disk_that_fails_hides_no_error_of_the_users(tmp_path: Path, disk: Path, request: Any) -> None:
    with pytest.raises(KeyError, match="the user's own"):
        train(tmp_path, disk / "run", lambda: SPOIL[request.node.callspec.params["disk"]](disk), error=True)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", [EVENTS, FLAGGED, SCALES, "incidents"])
@pytest.mark.parametrize(
    "odd",
    [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/full"), lambda path: path.symlink_to(path), Path.touch],
    ids=["pipe", "folder", "device", "link to itself", "empty file"],
)
def test_an_odd_file_in_place_of_a_record_ends_no_run(tmp_path: Path, name: str, odd: Callable[[Path], object]) -> None:
    (tmp_path / "run").mkdir()
    odd(tmp_path / "run" / name)
    train(tmp_path, tmp_path / "run")
    others = {EVENTS, FLAGGED, SCALES, "incidents"} - {name}
    assert all((tmp_path / "run" / other).exists() for other in others)


def test_a_file_in_place_of_the_log_folder_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    said = train(tmp_path, tmp_path / "run")
    assert [EVENTS in message for message in said].count(True) == 1, said
