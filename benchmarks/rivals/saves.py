"""What becomes of checkpoints: killed in a save, cut short, a full disk, NaN weights, fewer processes.

Every run is a process of its own, forked off this one. A run has 40 steps and saves every ten. Each way resumes as it
can. (`chaos.py` kills a run at each place in a save, `ranks.py` has the run of two processes.)
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common.children import in_a_child
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stability import FractionalCheckpoint
from lightning_stability.checkpointing import last_good_checkpoint
from rivals.packages import ArcWithLoss

STEPS, EVERY, FAULT, KILL = 40, 10, 15, 25
FAULTS = {
    "killed": "killed in the middle of the second save",
    "cut_short": "the file to resume from is cut in half",
    "full_disk": "the disk is full from the second save on",
    "nonfinite": "the weights become NaN between two saves",
    "fewer_ranks": "saved in two processes, resumed in one",
    "chaos": "what ckpt-chaos tries in the second save",
}


@dataclass
class Way:
    """How checkpoints are written, and how a run finds the one to resume from."""

    attach: Callable[[Path, float], dict[str, Any]]
    """Gets the folder, and the part of an epoch after which to save."""
    resume: Callable[[Path], str | None]


class ArcSaves(ArcWithLoss):
    """arc-training's durable checkpoint, every ten steps to the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        if self.path.exists():
            pl_module.resumed = self.controller.load_checkpoint(self.path)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % EVERY == 0 and trainer.is_global_zero:
            self.controller.save_checkpoint(self.path)


def _model_checkpoint(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=EVERY, save_last=True, save_top_k=-1)


def _last(folder: Path) -> str | None:
    found = folder / "last.ckpt"
    return str(found) if found.exists() else None


def _last_good(folder: Path) -> str | None:
    found = last_good_checkpoint(folder)
    return None if found is None else str(found)


def _fractional(folder: Path, fraction: float, **options: Any) -> dict[str, Any]:
    return {"callbacks": [FractionalCheckpoint(fraction, dirpath=folder, save_top_k=-1, **options)]}


WAYS = {
    "ModelCheckpoint": Way(lambda folder, _: {"callbacks": [_model_checkpoint(folder)]}, _last),
    "ModelCheckpoint, AsyncCheckpointIO": Way(
        lambda folder, _: {"callbacks": [_model_checkpoint(folder)], "plugins": [AsyncCheckpointIO()]}, _last
    ),
    "arc-training's save_checkpoint": Way(
        lambda folder, _: {"callbacks": [ArcSaves(folder / "arc.pt")], "enable_checkpointing": False}, lambda _: None
    ),
    "**ours:** FractionalCheckpoint": Way(_fractional, _last_good),
    "**ours:** FractionalCheckpoint, async_save=True": Way(partial(_fractional, async_save=True), _last_good),
}


class Net(pl.LightningModule):
    """Large enough for several writes to a file."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 1)
        self.register_buffer("large", torch.rand(2**18))
        self.resumed = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Fault(pl.Callback):
    """What happens to a run."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == FAULT and self.kind == "killed":
            time.sleep(1)  # the first save is written, in the background too
            written = max(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills the process in the middle of a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (written // 2, written // 2))
        if trainer.global_step == FAULT and self.kind == "nonfinite":
            pl_module.net.weight.data.fill_(torch.nan)
        if trainer.global_step == KILL and self.kind in ("cut_short", "nonfinite"):
            time.sleep(1)  # what is written in the background is written
            os._exit(9)


def fit(way: Way, folder: Path, fault: pl.Callback | None, epochs: int = 1) -> dict[str, Any]:
    """One run; where it began and ended. Without a fault it resumes what is there.

    Args:
        way: How it saves.
        folder: The checkpoints'.
        fault: What happens to it.
        epochs: Among which the steps are divided.
    """
    module = Net()
    data = DataLoader(torch.randn(STEPS // epochs, 4, 8), batch_size=None)
    return {**run(way, folder, module, data, fault, max_epochs=epochs), "weights": module.net.weight.flatten().tolist()}


def run(
    way: Way, folder: Path, module: Net, data: Any, fault: pl.Callback | None, max_epochs: int = 1, **more: Any
) -> dict[str, Any]:
    """Train a module; where that began and ended."""
    attached = way.attach(folder, EVERY * max_epochs / STEPS)
    first = FirstStep()
    callbacks = [*attached.pop("callbacks"), *([] if fault is None else [fault]), first]
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": max_epochs, "logger": False, "callbacks": callbacks}
    silent = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**(options | silent | attached | more))
    raised = None
    try:
        trainer.fit(module, data, ckpt_path=way.resume(folder) if fault is None else None)
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"[:160]
    finite = all(bool(torch.isfinite(p).all()) for p in module.parameters())
    began = module.resumed or (trainer.global_step if first.step is None else first.step)
    return {"began": began, "ended": trainer.global_step, "finite": finite, **({"raised": raised} if raised else {})}


class FirstStep(pl.Callback):
    """Where a run begins."""

    step: int | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.step is None:
            self.step = trainer.global_step


def judged(way: Way, kind: str) -> dict[str, Any]:
    """A run with a fault, and what its resume makes of what it left."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "checkpoints"
        folder.mkdir()
        mounted = kind == "full_disk" and mount(folder, way)
        try:
            if kind == "full_disk" and not mounted:
                return {"outcome": "not measured: no small disk can be mounted"}
            first = in_a_child(lambda: fit(way, folder, Fault(kind, folder)))
            if kind == "cut_short":
                whole = Path(way.resume(folder) or folder / "arc.pt")
                os.truncate(whole, whole.stat().st_size // 2)
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
            second = in_a_child(lambda: fit(way, folder, None))
        finally:
            if mounted:
                subprocess.run(["umount", str(folder)], check=False)
    return {"outcome": outcome(kind, first, second), "first": first, "resumed": second}


def mount(folder: Path, way: Way) -> bool:
    """A disk that holds the checkpoints of one save, and half of one more. It is enlarged before the resume."""
    with tempfile.TemporaryDirectory() as other:
        in_a_child(lambda: fit(way, Path(other), Fault("cut_short", Path(other))))
        sizes = [path.stat().st_size for path in Path(other).rglob("*") if path.is_file() and not path.is_symlink()]
    size = int(1.5 * sum(sizes) / (KILL // EVERY if len(sizes) > 1 else 1) / 1024)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def outcome(kind: str, first: dict[str, Any], second: dict[str, Any]) -> str:
    """In words."""
    if "raised" in second or "killed" in second:
        return f"no resume: {second.get('raised', 'killed').partition(':')[0]}"
    text = f"resumed at step {second['began']}" if second["began"] else "started anew"
    if not second["finite"]:
        text += " with NaN weights"
    if kind == "full_disk":
        error = first.get("raised", "").partition(":")[0]
        ended = f"{error} at step {first['ended']}" if error else "the run continued"
        return f"{ended}; {text}"
    return text


def step_of(found: dict[str, Any]) -> float:
    """Where a run went on with finite weights, less what is amiss with it; -1 if it did not."""
    if "passed" in found:
        return float(found["passed"] / found["of"])
    resumed = found.get("resumed", {})
    is_good = resumed.get("finite") and "raised" not in resumed
    return resumed["began"] - found.get("amiss", 0) / 1000 if is_good else -1.0
