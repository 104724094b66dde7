"""The first batch of a validation whose output, or what it logged, is not finite."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_stability.diagnosis.validation import is_spoilt
from lightning_stability.health.values import named_tensors
from lightning_stability.internals import active_results
from lightning_stability.recovery import MetricUndo
from lightning_stability.recovery.random_state import RandomState


@dataclass
class ValidationBatch:
    """A batch of a validation."""

    batch: Any
    batch_idx: int
    loader: int
    random: RandomState
    bad: Tensor | None = None
    """Whether its output was not finite, where that was computed."""


class ValidationWatch:
    """Looks at each batch of a validation; on a device the host reads the verdict when the next batch is through."""

    def __init__(self, trainer: Any) -> None:
        self._metrics = MetricUndo(trainer.lightning_module, lambda: active_results(trainer))
        self._device = trainer.strategy.root_device
        self._open: ValidationBatch | None = None
        self._pending: deque[ValidationBatch] = deque()

    def begin(self, batch: Any, batch_idx: int, loader: int) -> None:
        """A batch is about to enter `validation_step`."""
        self._open = ValidationBatch(batch, batch_idx, loader, RandomState.capture(self._device))
        self._metrics.remember()

    def end(self, outputs: Any) -> ValidationBatch | None:
        """It is through. Returns the first batch known to be bad, if there is one."""
        now, self._open = self._open, None
        if now is None:
            return None
        flags = [is_spoilt(t) for _, t in named_tensors(outputs, "output") if t.is_floating_point()]
        logged = self._metrics.nonfinite()
        flags += [] if logged is None else [logged]
        if flags:
            now.bad = torch.stack([flag.to(self._device) for flag in flags]).any()
            self._pending.append(now)
        return self.settle(keep=int(self._device.type != "cpu"))

    def settle(self, keep: int = 0) -> ValidationBatch | None:
        """Read the verdicts.

        Args:
            keep: On how many of the newest batches they may still be on their way.
        """
        while len(self._pending) > keep:
            oldest = self._pending.popleft()
            if bool(oldest.bad):
                self._pending.clear()
                return oldest
        return None
