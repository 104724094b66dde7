"""Packages of the index that are handed the loss of each step, and say what they think of the run."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from rivals.packages import OfLoss


class Thermoclaw(OfLoss):
    """`Observer` after each update, and `diagnose` at the end."""

    observer: Any = None

    def __init__(self, closely: bool) -> None:
        pass

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        from thermoclaw import Observer  # type: ignore[import-not-found]

        self.observer = Observer(pl_module, trainer.optimizers[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.observer.step(loss=self.loss)

    def findings(self) -> str:
        from thermoclaw import diagnose

        return str(diagnose(self.observer))


class TrainPulse(OfLoss):
    """`Monitor` with the loss, the gradient norm and the rate of each step."""

    def __init__(self, closely: bool) -> None:
        from trainpulse import Monitor  # type: ignore[import-not-found]

        self.monitor = Monitor()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.monitor.step_start()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        step = trainer.global_step
        for name, value in ("loss", self.loss), ("grad_norm", norm), ("learning_rate", optimizer.param_groups[0]["lr"]):
            self.monitor.log(name, step, float(value))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.monitor.step_end(trainer.global_step)

    def findings(self) -> str:
        return "\n".join(str(alert) for alert in self.monitor.report().alerts)


class TrainingDoctor(OfLoss):
    """`Doctor.log` at each step. (Its callback for Lightning is none, and the class that is one calls nothing.)"""

    def __init__(self, closely: bool) -> None:
        from training_doctor import Doctor  # type: ignore[import-not-found]

        self.doctor = Doctor()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.doctor.log(step=trainer.global_step, loss=self.loss, lr=rate)

    def findings(self) -> str:
        return "\n".join(str(diagnosis) for diagnosis in self.doctor.diagnoses)


class TrainWatch(pl.Callback):
    """`Watcher.step` with the loss of each step."""

    def __init__(self, closely: bool) -> None:
        from trainwatch import Watcher  # type: ignore[import-not-found]

        self.watcher = Watcher(device="cuda" if torch.cuda.is_available() else "cpu")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs:
            self.watcher.step(loss=float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.watcher.epoch_end()
