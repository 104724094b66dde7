"""A small callback that records the step in which a run goes wrong, and ends it."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor

from lightning_stability.diagnosis.step import RecordedStep, capture_state
from lightning_stability.health.values import nonfinite_names
from lightning_stability.recovery.random_state import RandomState
from tests.zoo.program import Program


class Stop(Exception):
    """The step is recorded."""


class Recorder(pl.Callback):
    """Keeps the open window; `step` is the recorded one."""

    def __init__(self) -> None:
        self.step: RecordedStep | None = None
        self.window: RecordedStep | None = None
        self.buffers: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self.window = RecordedStep(
                pl_module, [], [],
                precision=trainer.precision_plugin.precision,
                state=capture_state(pl_module, trainer.optimizers),
                optimizers=trainer.optimizers,
                loss_divisor=trainer.accumulate_grad_batches,
                loss_scale=scaler.get_scale() if scaler else None,
                clip_value=trainer.gradient_clip_val,
                trainer={
                    name: getattr(trainer, name)
                    for name in ("current_epoch", "global_step", "estimated_stepping_batches")
                },
            )  # fmt: skip
            self.buffers = nonfinite_names(pl_module.named_buffers())
        self.window.batches.append(copy.deepcopy(batch))
        self.window.batch_indices.append(batch_idx)
        self.window.random_states.append(RandomState.capture())

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        true_loss = loss.detach() / (self.window.loss_scale or 1.0)
        if trainer.lightning_module.automatic_optimization:
            self.window.losses.append(float(true_loss))
        if not torch.isfinite(true_loss):
            self.stop("loss")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        skipped_by_scaler = (self.window.loss_scale or 0.0) > 1.0
        gradients = ((n, p.grad) for n, p in pl_module.named_parameters() if p.grad is not None)
        if not skipped_by_scaler and nonfinite_names(gradients):
            self.stop("gradient")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if nonfinite_names(pl_module.named_parameters()):
            self.stop("weight")
        if set(nonfinite_names(pl_module.named_buffers())) - set(self.buffers):
            self.stop("buffer")

    def stop(self, failed: str) -> None:
        self.step, self.window.failed = self.window, failed
        raise Stop


def record(program: Program, callbacks: Any = ()) -> tuple[RecordedStep | None, Recorder]:
    """Train a program until it goes wrong; return the recorded step, None if it does not."""
    recorder = Recorder()
    options: dict[str, Any] = {"precision": program.precision}
    if program.precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=program.loss_scale)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    defaults = {"accelerator": "cpu", "max_epochs": 1, "callbacks": [*callbacks, recorder], **quiet}
    trainer = pl.Trainer(**(defaults | options | program.options))
    with contextlib.suppress(Stop):
        trainer.fit(program.module, program.data)
    return recorder.step, recorder
