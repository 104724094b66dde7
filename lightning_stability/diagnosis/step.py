"""One recorded training step: all that is needed to run it again."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_stability.recovery.random_state import RandomState

State = dict[str, Any]

REJECTED = "rejected"
"""What has failed in a step whose batch InputCheck has rejected: nothing yet."""


@dataclass
class RecordedStep:
    """One optimizer step: the batches of its window, and everything as it was before the first of them.

    Attributes:
        module: The LightningModule. It is never changed: a replay runs a copy.
        batches: What `training_step` got, in order; one unless gradients are accumulated.
        random_states: What `RandomState.capture()` gave before each batch.
        batch_indices: The `batch_idx` of each; counted from 0 if none are given.
        precision: Lightning's word, such as `"16-mixed"`.
        losses: The loss of each batch as Lightning has it in `outputs["loss"]`: unscaled, divided by
            `loss_divisor`. Empty if unknown: then a replay cannot be compared with the recording.
        failed: What was non-finite: `"loss"`, `"gradient"`, `"buffer"`, `"weight"`, `"validation"`, `"rejected"`, ...
        state: What `capture_state` gave before the first batch; None if the module is in that state now.
        optimizers: The module's.
        optimizer: Which of them made the step.
        loss_divisor: `accumulate_grad_batches`.
        loss_scale: The GradScaler's; None without one.
        clip_value: The Trainer's `gradient_clip_val`.
        clip_algorithm: `"norm"` or `"value"`.
        trainer: What `training_step` may read of its Trainer, by name: `current_epoch`, `global_step`, ...
        environment: What `capture_environment` gave; empty for the process of now.
        notes: What makes a replay inexact, such as a batch that `training_step` changed in place.
        steps_before: How many optimizer steps the window had before this one, in manual optimization: `state` is that
            after them, so a replay leaves them out.
        schedulers: The optimizer of each of the Trainer's schedulers, by its index.
        validation_loader: Of a step of the validation, the index of its data loader; None for a training step.
        extra_state: What `state.pt` shall hold besides, for the reader: a replay does not need it.

    Example:
        >>> module = torch.nn.Linear(1, 1)
        >>> step = RecordedStep(module, batches=[torch.ones(2, 1)], random_states=[RandomState.capture()])
        >>> step.batch_indices, step.precision, step.failed
        ([0], '32-true', 'loss')
    """

    module: nn.Module
    batches: list[Any]
    random_states: list[RandomState]
    batch_indices: list[int] = field(default_factory=list)
    precision: str = "32-true"
    losses: list[float] = field(default_factory=list)
    failed: str = "loss"
    state: State | None = None
    optimizers: list[Optimizer] = field(default_factory=list)
    optimizer: int = 0
    loss_divisor: int = 1
    loss_scale: float | None = None
    clip_value: float | None = None
    clip_algorithm: str = "norm"
    trainer: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    steps_before: int = 0
    schedulers: list[int] = field(default_factory=list)
    validation_loader: int | None = None
    extra_state: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.batch_indices:
            self.batch_indices = list(range(len(self.batches)))


def capture_state(module: nn.Module, optimizers: Iterable[Optimizer] = (), copies: bool = True) -> State:
    """All that a step changes, in a form that loads with `weights_only=True`.

    Args:
        module: The LightningModule.
        optimizers: Its optimizers.
        copies: Whether it shall last; what is written to a disk at once needs no second place in memory.

    Example:
        >>> module = torch.nn.Linear(1, 1)
        >>> state = capture_state(module)
        >>> _ = module.weight.data.fill_(float("nan"))
        >>> restore_state(state, module)
        >>> module.weight.isfinite().item()
        True
    """
    metrics = {path: m.metric_state for path, m in module.named_modules() if isinstance(m, Metric)}
    state = {
        "parameters": {name: tensor.detach() for name, tensor in module.named_parameters()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in module.named_parameters()},
        "buffers": {name: tensor.detach() for name, tensor in module.named_buffers()},
        "metrics": metrics,
        "optimizers": [_without_numpy(optimizer.state_dict()) for optimizer in optimizers],
    }
    return copy.deepcopy(state) if copies else state


def _without_numpy(state: State) -> State:
    """A scheduler that computes in numpy leaves its numbers in the options; they would not load without code."""
    plain: State = apply_to_collection(state, np.generic, lambda number: number.item())
    return plain


@torch.no_grad()
def restore_state(state: State, module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
    """Make a module and its optimizers what they were.

    Args:
        state: What `capture_state` gave.
        module: Of the same class, built in the same way.
        optimizers: Its optimizers; may be fewer than those recorded.

    Raises:
        ValueError: If the module has other parameters or other shapes.

    Example:
        >>> module = torch.nn.Linear(1, 1)
        >>> state = capture_state(module)
        >>> _ = module.bias.data.fill_(7.0)
        >>> restore_state(state, module)
        >>> module.bias.item() == 7.0
        False
    """
    parameters = dict(module.named_parameters())
    if set(parameters) != set(state["parameters"]):
        odd = sorted(set(parameters) ^ set(state["parameters"]))
        raise ValueError(f"the recorded parameters are not those of the module: {', '.join(odd[:3])}")
    for name, value in state["parameters"].items():
        if parameters[name].shape != value.shape:
            shapes = f"{list(value.shape)} recorded, {list(parameters[name].shape)} in the module"
            raise ValueError(f"the parameter {name} has another shape: {shapes}")
        parameters[name].data = parameters[name].data.to(value.dtype)
        parameters[name].copy_(value)
        parameters[name].requires_grad_(state["requires_grad"][name])  # manual optimization may have been interrupted
    for name, value in state["buffers"].items():
        _set_buffer(module, name, value)
    for path, values in state["metrics"].items():
        metric = cast(Metric, module.get_submodule(path))
        for name, value in values.items():  # a list of tensors, or one
            setattr(metric, name, move_data_to_device(copy.deepcopy(value), metric.device))
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=False):
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))


def _set_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, own = name.rpartition(".")
    owner = module.get_submodule(path)
    now = owner._buffers.get(own)
    if now is not None and now.shape == value.shape:
        now.data = now.data.to(value.dtype)
        now.copy_(value)
    else:
        setattr(owner, own, value.clone() if now is None else value.to(now.device, copy=True))
