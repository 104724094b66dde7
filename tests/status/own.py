"""A module that trains and does, at one step, what it is told."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringDataModule, BoringModel
from torch import nn
from torch.utils.data import DataLoader

from lightning_stability.events import EventLog


class Model(BoringModel):
    """Trains one layer.

    Args:
        at: The step at which something happens.
        happens: What.
        gates: Steps at which it waits for the file `go-STEP` in the working folder, or for its parent's end.
    """

    def __init__(self, at: int = -1, happens: str = "", gates: list[int] | None = None) -> None:
        super().__init__()
        self.at, self.happens, self.gates = at, happens, gates or []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.step(batch)
        if self.trainer.global_step in self.gates:
            parent = os.getppid()
            while not Path(f"go-{self.trainer.global_step}").exists() and os.getppid() == parent:
                time.sleep(0.01)
        if self.trainer.global_step == self.at:
            if self.happens == "nan":
                loss = loss * float("nan")
            elif self.happens == "raise" or (self.happens == "raise on rank 1" and self.global_rank == 1):
                raise ValueError("on purpose\nwith a second line")
            elif self.happens == "interrupt":
                raise KeyboardInterrupt
            elif self.happens == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.happens == "slow":
                time.sleep(0.1)
            elif self.happens == "stop":
                self.trainer.should_stop = True
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.happens == "raise in validation":
            raise ValueError("before training")
        self.log("val_loss", self.step(batch))


class Data(BoringDataModule):
    """Random samples."""


class BadSamples(BoringDataModule):
    """16 batches of one sample, of which the third and the tenth are NaN."""

    def train_dataloader(self) -> Any:
        samples = torch.randn(16, 32)
        samples[[2, 9]] = float("nan")
        return DataLoader(samples)


class OutOfScale(nn.Module):
    """Multiplies, as the statistics of another data set do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e5 * x


class TwoOptimizers(BoringModel):
    """Trains its weight and its bias apart."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.step(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([parameter], 1e-3) for parameter in self.parameters()]


class Progress(pl.Callback):
    """Writes `progress` after every batch."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        folder = trainer.log_dir  # it is a broadcast
        if trainer.is_global_zero:
            norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            EventLog(folder).write(
                "progress",
                trainer.global_step,
                trainer.current_epoch,
                batch_idx=batch_idx,
                batches=trainer.num_training_batches,
                loss=float(outputs["loss"]) if outputs else None,
                grad_norm=float(torch.stack(norms).norm()) if norms else None,
                loss_scale=None,
                learning_rate=trainer.optimizers[0].param_groups[0]["lr"],
                skipped=0,
                seconds=0.0,
            )
