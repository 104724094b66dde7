"""A module that trains and does, at one step, what it is told."""

import os
import signal
import time
from typing import Any

import torch
from pytorch_lightning.demos.boring_classes import BoringDataModule, BoringModel


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
            elif self.happens == "raise":
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
