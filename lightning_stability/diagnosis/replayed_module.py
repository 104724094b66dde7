"""What a LightningModule's code finds in a replay: a Trainer that logs nothing, and copies of its optimizers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stability.diagnosis.step import RecordedStep


class Replaying(Protocol):
    """The replay that a module is run by."""

    step: RecordedStep
    module: nn.Module
    optimizers: list[Optimizer]

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Check a loss, run the backward pass, and check the gradients."""

    def update(self, optimizer: Optimizer | None) -> None:
        """Check the gradients, step, and check the weights."""


class ReplayedTrainer:
    """What a LightningModule may ask its Trainer for.

    Args:
        recorded: What was recorded of the Trainer, by name.
    """

    def __init__(self, recorded: dict[str, Any], module: nn.Module, optimizers: list[Optimizer]) -> None:
        known = {"world_size": 1, "global_rank": 0, "local_rank": 0, "num_nodes": 1, "sanity_checking": False}
        vars(self).update(known | {"training": True, "validating": False, "callback_metrics": {}, "callbacks": []})
        vars(self).update(recorded)
        self.optimizers = optimizers
        self.lightning_module = module
        self.logger = DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the module reads trainer.{name}, which is not recorded")


def give_trainer(module: nn.Module, recorded: dict[str, Any], optimizers: list[Optimizer]) -> None:
    """Let a module find a Trainer that logs nothing.

    Args:
        recorded: What was recorded of the Trainer, by name.
    """
    trainer = ReplayedTrainer(recorded, module, optimizers)
    for part in module.modules():
        if hasattr(part, "log_dict") and hasattr(part, "automatic_optimization"):  # a LightningModule
            for name in ("log", "log_dict", "print"):
                object.__setattr__(part, name, _nothing)
            object.__setattr__(part, "_trainer", trainer)
            object.__setattr__(part, "_fabric", None)


def note_logged(module: Any) -> list[tuple[str, Tensor]]:
    """From now on note what a LightningModule logs.

    Returns:
        The names and values, added as they come.
    """
    logged: list[tuple[str, Tensor]] = []

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, Tensor):
            logged.append((name, value))

    def log_dict(values: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(values).items():
            log(name, value)

    object.__setattr__(module, "log", log)
    object.__setattr__(module, "log_dict", log_dict)
    return logged


class ReplayedOptimizer:
    """An optimizer that manual optimization steps."""

    def __init__(self, optimizer: Optimizer, replay: Replaying) -> None:
        self.optimizer = optimizer
        self._replay = replay

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        """One step, with the checks of the replay."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._replay.update(self.optimizer)
        return result

    @contextlib.contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Train its parameters alone for a while."""
        module: Any = self._replay.module
        module.toggle_optimizer(self)
        try:
            yield
        finally:
            module.untoggle_optimizer(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class _NoScheduler:
    """A learning rate does not change within a step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def get_last_lr(self) -> list[float]:
        """The rates of now."""
        return [group["lr"] for group in self.optimizer.param_groups]


def attach(replay: Replaying) -> None:
    """Give the copied module what it finds in a fit."""
    wrapped = [ReplayedOptimizer(optimizer, replay) for optimizer in replay.optimizers]
    known = [index for index in replay.step.schedulers if index < len(replay.optimizers)]
    schedulers = [_NoScheduler(replay.optimizers[index]) for index in known]

    def optimizers(use_pl_optimizer: bool = True) -> Any:
        return wrapped[0] if len(wrapped) == 1 else list(wrapped)

    def lr_schedulers() -> Any:
        return schedulers[0] if len(schedulers) == 1 else schedulers or None

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        replay.manual_backward(loss, *args, **kwargs)

    def clip_gradients(optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        if gradient_clip_val:
            clip(parameters, gradient_clip_val)

    own = {
        "optimizers": optimizers,
        "lr_schedulers": lr_schedulers,
        "manual_backward": manual_backward,
        "clip_gradients": clip_gradients,
    }
    for name, method in own.items():
        object.__setattr__(replay.module, name, method)
    recorded = replay.step.trainer | {"accumulate_grad_batches": replay.step.loss_divisor}
    give_trainer(replay.module, recorded, replay.optimizers)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
