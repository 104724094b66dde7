"""Finding the origin of a recorded step's failure, in the process that has it."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_stability.diagnosis.origin import Origin, find
from lightning_stability.diagnosis.replay import Outcome, Replay
from lightning_stability.diagnosis.step import RecordedStep
from lightning_stability.diagnosis.trace import Trace


def find_origin(step: RecordedStep, budget_seconds: float = math.inf) -> Origin | None:
    """Run a step again, look at every operation, and find where the first non-finite value was made.

    The module, its gradients, metrics and optimizers and the process's random state are left as they are.

    Args:
        step: The recorded step.
        budget_seconds: When to give up.

    Returns:
        The origin; None if the step is finite now.

    Raises:
        DiagnosisError: If the step cannot be run again, or not in time; the message says why.

    Example:
        >>> import torch
        >>> from pytorch_lightning import LightningModule
        >>> from lightning_stability.recovery.random_state import RandomState
        >>> class Model(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(1, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch.log()).sum()
        >>> step = RecordedStep(Model(), batches=[torch.zeros(1, 1)], random_states=[RandomState.capture()])
        >>> origin = find_origin(step)
        >>> origin.phase, origin.op, origin.tensor
        ('forward', 'log', 'batch')
    """
    return trace_step(step, budget_seconds)[0]


def trace_step(step: RecordedStep, budget_seconds: float = math.inf) -> tuple[Origin | None, Outcome]:
    """The same, and what the replay came to.

    Args:
        step: The recorded step.
        budget_seconds: When to give up.
    """
    origin, outcome, _ = look_at(step, budget_seconds)
    return origin, outcome


def look_at(
    step: RecordedStep, budget_seconds: float = math.inf, clock: Callable[[], float] = time.monotonic
) -> tuple[Origin | None, Outcome, Trace]:
    """The same, and every operation of the replay.

    Args:
        step: The recorded step.
        budget_seconds: When to give up.
        clock: Gives seconds.
    """
    deadline = clock() + budget_seconds
    replay = Replay(step)
    trace = Trace(replay.module, deadline, clock)
    outcome = replay.run(trace)
    if outcome.failure is None:
        return None, outcome, trace
    origin = find(trace, outcome.failure.tensors, outcome.failure.what)
    if origin is not None and origin.phase == "optimizer" and origin.file is None:
        _point_at_constructor(origin, step.module, step.optimizers[step.optimizer])
    return origin, outcome, trace


def _point_at_constructor(origin: Origin, module: nn.Module, optimizer: Optimizer) -> None:
    """No line of the user's runs in the optimizer's step: show the one that made the optimizer."""
    method: Any = getattr(type(module), "configure_optimizers", None)
    try:
        lines, first = inspect.getsourcelines(method)
        origin.file = inspect.getsourcefile(method)
    except (OSError, TypeError):
        return
    called = f"{type(optimizer).__name__}("
    offset = next((i for i, line in enumerate(lines) if called in line), 0)
    origin.line, origin.code = first + offset, lines[offset].strip()
