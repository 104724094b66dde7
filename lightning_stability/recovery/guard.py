"""The guard: a bad update is not made, and what its forward pass wrote is given back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_stability.recovery.undo import BufferUndo, MetricUndo, either


@dataclass(slots=True)
class Verdict:
    """What the guard decided of one step.

    Attributes:
        bad: 1.0 if this step's loss, gradients or buffers are not finite; float32, 0-dimensional, on the device.
        ordinary: 1.0 if the loss and the buffers are finite, so that GradScaler may have an answer.
        skipped: The same on the host, where it was read there; None where the device decided alone.
        found_inf: 1.0 if GradScaler found the gradients non-finite; None without its word.
        held: 1.0 if the update was held back because an earlier step has ended the run.
        buffer: Index of a buffer that the forward pass made non-finite, and 1.0 if there is one.
    """

    bad: Tensor
    ordinary: Tensor
    skipped: bool | None = None
    found_inf: Tensor | None = None
    held: Tensor | None = None
    buffer: tuple[Tensor, Tensor] | None = None


class Guard:
    """Decides for every optimizer step whether it is taken. Bad is what is not finite: loss, gradients, buffers.

    With an optimizer that takes `found_inf` (torch's fused ones) the device decides and the host is told later; with
    any other the host reads one scalar before the optimizer steps. On the device a count of bad steps runs along:
    once it exceeds `patience`, every later update is held back until the host has read it and stops.

    Args:
        module: The LightningModule.
        results: Returns what `self.log` accumulates.
        distributed: Whether several processes train together. Then only what all of them see counts, the
            gradients: a bad loss on one rank is made to show in them.
    """

    def __init__(self, module: Any, results: Callable[[], Any], distributed: bool) -> None:
        self._module = module
        self._distributed = distributed
        self._buffers = BufferUndo(module)
        self._metrics = MetricUndo(module, results)
        self.patience = math.inf
        self._in_batch = False
        self._rescan_due = False
        self._watch_writes = 2  # forward passes in which to look for weights that are written
        self._batch_bad: Tensor | None = None
        self._forward_bad: Tensor | None = None
        self._written: tuple[Tensor, Tensor] | None = None
        self._bad_in_a_row: dict[Optimizer, Tensor] = {}
        self._held: Tensor | None = None

    # A batch.

    def begin_batch(self) -> None:
        """A batch is about to enter `training_step`."""
        self.settle_batch()
        if self._rescan_due:
            self._rescan_due = False
            self._buffers.rescan()
            self._metrics.rescan()
        self._in_batch = True
        self._batch_bad = self._forward_bad = None
        self._buffers.remember()
        self._metrics.remember()
        if self._watch_writes:
            self._buffers.note_versions()

    def note_loss(self, loss: Tensor) -> None:
        """A forward pass has ended in this loss; its backward pass is about to run.

        Args:
            loss: With its graph.
        """
        if not self._in_batch:
            return
        if self._watch_writes:
            self._watch_writes -= 1
            self._buffers.find_written()
        finite = torch.isfinite(loss.detach()).all()
        self._forward_bad = finite.logical_not()
        if self._distributed and loss.requires_grad and (finite.device.type != "cpu" or not finite):
            # Ranks hear of each other through the gradients' all-reduce alone.
            factor = torch.where(finite, 1.0, math.nan)
            loss.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: gradient * factor.to(gradient.dtype)
            )

    def after_backward(self) -> None:
        """The backward pass is through; whatever the forward pass wrote stays or goes now."""
        if not self._in_batch or self._forward_bad is None:
            return
        bad, self._forward_bad = self._forward_bad, None
        written = self._buffers.nonfinite()
        if written is not None:
            bad = bad | written[0].to(bad.device)
            self._written = either(self._written, written)
        if self._held is not None:
            bad = bad | (self._held > 0)
        self._buffers.give_back(bad)
        self._batch_bad = bad if self._batch_bad is None else self._batch_bad | bad
        if not self._module.automatic_optimization:  # another forward pass may follow in this batch
            self._buffers.remember()
            if self._watch_writes:
                self._buffers.note_versions()

    def forget_batch(self) -> None:
        """The batches of this step are going to be trained again: what they were judged does not count."""
        self._batch_bad = self._forward_bad = self._written = None

    def settle_batch(self) -> None:
        """Give metric states back; once after `training_step`, once more for what was logged after it."""
        if not self._in_batch:
            return
        if self._batch_bad is None:
            self._judge_forward_alone()
        if self._batch_bad is not None:
            self._metrics.give_back(self._batch_bad)

    def _judge_forward_alone(self) -> None:
        """A forward pass that Lightning ran no backward pass for: only the buffers can tell."""
        written = self._buffers.nonfinite()
        if written is not None:
            self._buffers.give_back(written[0])
            self._batch_bad = written[0]

    def settle_all(self) -> None:
        """Before metrics are computed or saved: nothing of a bad batch may be left in them."""
        self.settle_batch()
        self._metrics.trim()

    def end_epoch(self) -> None:
        """The epoch's metrics are computed and reset next."""
        self.settle_all()
        self._in_batch = False

    def rescan(self) -> None:
        """An epoch begins: modules, buffers and metrics may be others, once its hooks have run."""
        self._rescan_due = True

    def after_step(self) -> None:
        """An optimizer has written the weights: that is no writing of the forward pass."""
        if self._watch_writes and self._in_batch:
            self._buffers.note_versions()

    def name_of_buffer(self, index: float) -> str:
        """The buffer that a verdict points at.

        Args:
            index: As in `Verdict.buffer`.
        """
        return self._buffers.name_at(int(index))

    # A step.

    @torch.no_grad()
    def judge(self, total_norm: Tensor, largest: float, scale: Tensor | None, loss: Tensor | None) -> Verdict:
        """Decide on the device whether a step is good.

        Args:
            total_norm: Norm of all its gradients, 0-dimensional.
            largest: Above it their squares overflow.
            scale: What they are multiplied with; None for nothing.
            loss: Sum of the losses of its batches; None if it has none.
        """
        limit = largest if scale is None else largest * scale.to(total_norm.dtype)
        good = total_norm <= limit  # false for nan
        written, self._written = self._written, None
        forward_good = torch.ones_like(good)
        if not self._distributed:
            if loss is not None:
                forward_good = torch.isfinite(loss).to(good.device)
            if written is not None:
                forward_good = forward_good & ~written[0].to(good.device)
        bad = (good & forward_good).logical_not().float()
        return Verdict(bad=bad, ordinary=forward_good.float(), buffer=written)

    def judge_again(self, verdict: Verdict, total_norm: Tensor) -> None:
        """Take back a good verdict if the gradients have become bad since.

        Args:
            verdict: What `judge` returned.
            total_norm: Norm of the gradients as they are now.
        """
        verdict.bad = torch.maximum(verdict.bad, torch.isfinite(total_norm).logical_not().float())

    @contextmanager
    def decide(self, optimizer: Optimizer, verdict: Verdict) -> Iterator[bool]:
        """Around the optimizer's own step: yields whether the host shall call it.

        Args:
            optimizer: The bare torch optimizer.
            verdict: What `judge` returned; completed here.
        """
        verdict.found_inf = getattr(optimizer, "found_inf", None)
        if not decides_on_device(optimizer):
            verdict.skipped = bool(verdict.bad)
            yield not verdict.skipped
            return
        found_inf = verdict.bad
        if verdict.found_inf is not None:
            found_inf = torch.maximum(found_inf, verdict.found_inf.to(found_inf.device))
        if self.patience < math.inf and not (self._distributed and verdict.found_inf is not None):
            # (under a GradScaler only the host can learn from the other ranks whether a skip is an ordinary one)
            found_inf = torch.maximum(found_inf, self._hold(optimizer, verdict))
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        try:
            yield True
        finally:
            # GradScaler deletes its own after the step
            if verdict.found_inf is None:
                del optimizer.found_inf  # type: ignore[attr-defined]
            else:
                optimizer.found_inf = verdict.found_inf  # type: ignore[attr-defined]

    def _hold(self, optimizer: Optimizer, verdict: Verdict) -> Tensor:
        """Count bad steps on the device; from one too many on, hold every update."""
        counted = verdict.bad
        if optimizer not in self._bad_in_a_row:
            self._bad_in_a_row[optimizer] = torch.zeros_like(counted)
        row = self._bad_in_a_row[optimizer]
        if verdict.found_inf is None:
            row.add_(1.0).mul_(counted)
        else:
            # what GradScaler answers is neither counted nor does it end a row
            ordinary = verdict.found_inf.to(row.device) * verdict.ordinary
            row.copy_(torch.where(ordinary > 0, row, (row + 1.0) * counted))
        verdict.held = torch.zeros_like(row) if self._held is None else self._held
        over = (row > self.patience).float()
        self._held = over if self._held is None else torch.maximum(self._held, over)
        return self._held


def decides_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer skips an update by itself when `found_inf` says so, without the host.

    torch's fused optimizers do. Fused SGD with momentum does once its momentum buffers exist: a first step that is
    skipped on the device would leave them uninitialised.

    Args:
        optimizer: The bare torch optimizer.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return False
    if not all(group.get("fused") for group in optimizer.param_groups):
        return False
    if not isinstance(optimizer, SGD):
        return True
    return all(
        optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
        for group in optimizer.param_groups
        if group["momentum"]
        for parameter in group["params"]
        if parameter.grad is not None
    )
