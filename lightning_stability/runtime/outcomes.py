"""What became of each step, judged on the host once its numbers are there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_stability.health import StepRecord
from lightning_stability.health.forward_order import forward_order
from lightning_stability.recovery import Guard
from lightning_stability.runtime.steps import GRAD_SCALER, HALT, NO_LOSS, REJECTED

if TYPE_CHECKING:
    from lightning_stability.runtime.runtime import Runtime


class Outcomes:
    """Completes the records of a guarded run: was a skip an ordinary one, and what went bad first.

    Args:
        runtime: Holds the thresholds.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._skips_in_a_row: dict[int, int] = {}
        self._forward_order: dict[str, int] = {}
        self._places: dict[str, int] = {}

    def note_loss(self, loss: Tensor) -> None:
        """The first forward pass has ended in this loss: its graph says which parameters come first.

        Args:
            loss: With its graph.
        """
        if not self._forward_order:
            module = self._runtime.trainer.lightning_module
            names = {parameter: name for name, parameter in module.named_parameters()}
            self._forward_order = forward_order(loss, names) or {"": 0}

    def rename(self, names: Mapping[Tensor, str], changed: bool) -> None:
        """These parameters are trained.

        Args:
            names: Their names, in the module's order.
            changed: Whether other ones were trained before.
        """
        self._places = {name: place for place, name in enumerate(names.values())}
        if changed:
            self._forward_order = {}

    def forget_skips(self) -> None:
        """The precision is another one: a row of skips begins anew."""
        self._skips_in_a_row.clear()

    def complete(self, record: StepRecord, guard: Guard) -> None:
        """What only the runtime knows of a step.

        Args:
            record: Completed in place.
            guard: Which judged the step.
        """
        if record.buffer_index is not None:
            record.nonfinite_buffer = guard.name_of_buffer(record.buffer_index)
        if record.skipped_by not in (None, NO_LOSS, REJECTED):
            record.bad_loss_ranks = self._ranks_with_bad_loss(record)
        if not record.gradients_finite:
            record.culprit = self._culprit(record)
        row = self._skips_in_a_row.get(record.optimizer, 0)
        if record.skipped_by is None:
            record.outcome, row = "taken", 0
        elif record.skipped_by == NO_LOSS:
            record.outcome = "no_loss"
        elif record.skipped_by == REJECTED:
            record.outcome = "rejected"
        elif record.skipped_by == HALT:
            record.outcome = "held"
        elif record.skipped_by == GRAD_SCALER and not record.bad_loss_ranks and not record.nonfinite_buffer:
            row += 1
            collapsed = record.loss_scale is not None and record.loss_scale < self._runtime.min_loss_scale
            record.outcome = "bad" if collapsed or row > self._runtime.max_consecutive_skips else "ordinary_skip"
        else:
            record.outcome = "bad"
        self._skips_in_a_row[record.optimizer] = row

    def _ranks_with_bad_loss(self, record: StepRecord) -> tuple[int, ...]:
        trainer = self._runtime.trainer
        if trainer.world_size == 1:
            return () if record.loss_finite else (0,)
        # A collective, but only after a step that all ranks have skipped.
        flags = torch.zeros(trainer.world_size, device=trainer.strategy.root_device)
        flags[trainer.global_rank] = float(not record.loss_finite)
        dist.all_reduce(flags)
        return tuple(rank for rank, flag in enumerate(flags.tolist()) if flag)

    def _culprit(self, record: StepRecord) -> str | None:
        """The parameter nearest to where the gradient went bad: behind it, nearer to the loss, it was finite."""
        names = record.parameter_names
        if record.gradients == "overflow":
            return names[int(record.grad_norms.argmax())]
        bad = [name for name, norm in zip(names, record.grad_norms.tolist(), strict=True) if not math.isfinite(norm)]
        if not bad:
            return None
        return max(bad, key=lambda name: (self._forward_order.get(name, -1), self._places.get(name, -1)))
