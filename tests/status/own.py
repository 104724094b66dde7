"""A module that trains and does, at one step, what it is told."""

import os
import signal
import time
from typing import Any

import torch
from pytorch_lightning.demos.boring_classes import BoringDataModule, BoringModel
from torch import nn
from torch.utils.data import DataLoader


class Model(BoringModel):
    """Trains one layer."""

    def __init__(self, at: int = -1, happens: str = "", seconds: float = 0.0) -> None:
        super().__init__()
        self.at, self.happens, self.seconds = at, happens, seconds

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.step(batch)
        time.sleep(self.seconds)
        if self.trainer.global_step == self.at:
            if self.happens == "nan":
                loss = loss * float("nan")
            elif self.happens == "raise" or (self.happens == "raise on rank 1" and self.global_rank == 1):
                raise ValueError("on purpose\nwith a second line")
            elif self.happens == "interrupt":
                raise KeyboardInterrupt
            elif self.happens == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
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
