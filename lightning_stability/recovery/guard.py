"""The guard: a bad update is not made, and what its forward pass wrote is restored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_stability.recovery.metric_undo import MetricUndo
from lightning_stability.recovery.undo import BufferUndo, either
from lightning_stability.recovery.verdict import Verdict


class Guard:
    """Decides for every optimizer step whether it is taken. Bad is what is not finite: loss, gradients, buffers.

    With an optimizer that takes `found_inf` (torch's fused ones) the device decides and the host is told later; with
    any other the host reads one scalar before the optimizer steps. On the device a count of bad steps runs along:
    once it exceeds `patience`, every later update is held back until the host has read it and stops.

    A batch can also be rejected from outside, before it is trained on: then its step is not taken, whatever came of
    it, and what its forward pass wrote is restored. Such a step is neither bad nor good: the count passes over it.

    Args:
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
        self.forward_alone_bad: Tensor | None = None
        """Whether what this batch logged or wrote is not finite, if no backward pass and no step of it was seen."""
        self._forward_bad: Tensor | None = None
        self._counted: Tensor | None = None  # the newest loss, and whether it is finite
        self._counted_good: Tensor | None = None
        self._written: tuple[Tensor, Tensor] | None = None
        self._unseen: Tensor | None = None  # 1.0 if gradients of a backward pass that was not seen are not finite
        self._bad_in_a_row: dict[Optimizer, Tensor] = {}
        self._held: Tensor | None = None
        self._rejected: Tensor | None = None  # this batch
        self._rejected_before: dict[Optimizer, Tensor] = {}  # earlier ones, whose gradients wait for a step
        self._stepped: set[Optimizer] = set()  # in this batch

    # A batch.

    def begin_batch(self) -> None:
        """A batch is about to enter `training_step`."""
        self.settle_batch()
        self._carry_rejection()
        if self._rescan_due:
            self._rescan_due = False
            self._buffers.rescan()
            self._metrics.rescan()
        self._in_batch = True
        self._batch_bad = self._forward_bad = self._unseen = self.forward_alone_bad = None
        self._buffers.remember()
        self._metrics.remember()
        if self._watch_writes:
            self._buffers.note_versions()

    def reject(self, rejected: Tensor) -> None:
        """This batch is not to be trained on. Called after `begin_batch`, with what all ranks agree on."""
        self._rejected = rejected.to(torch.float32)

    def _carry_rejection(self) -> None:
        """Optimizers that did not step in the last batch have its gradients still to come."""
        rejected, self._rejected = self._rejected, None
        if rejected is not None:
            for optimizer in self._module.trainer.optimizers:
                if optimizer not in self._stepped:
                    before = self._rejected_before.get(optimizer)
                    self._rejected_before[optimizer] = rejected if before is None else torch.maximum(before, rejected)
        self._stepped.clear()

    def rejection_of(self, optimizer: Optimizer) -> Tensor | None:
        """1.0 if this step's gradients come from a rejected batch, among others; None if nobody rejects batches."""
        before = self._rejected_before.get(optimizer)
        if before is None or self._rejected is None:
            return self._rejected if before is None else before
        return torch.maximum(before, self._rejected)

    def note_loss(self, loss: Tensor, counted: Tensor | None = None) -> None:
        """A forward pass has ended in this loss; its backward pass is about to run.

        Args:
            counted: The same number, as `judge` will be given it if it is its step's only one.
        """
        self._counted = self._counted_good = None
        if not self._in_batch:
            return
        if self._watch_writes:
            self._watch_writes -= 1
            self._buffers.find_written()
        finite = _finite(loss.detach())
        self._forward_bad = finite.logical_not()
        if not loss.dim():
            self._counted, self._counted_good = counted, finite
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
        if self._rejected is not None:
            bad = bad | (self._rejected > 0).to(bad.device)
        self._buffers.restore(bad)
        self._batch_bad = bad if self._batch_bad is None else self._batch_bad | bad
        if not self._module.automatic_optimization:  # another forward pass may follow in this batch
            self._buffers.remember()
            if self._watch_writes:
                self._buffers.note_versions()

    def fail_batch(self, device: torch.device) -> None:
        """The forward pass has raised: restore what it wrote."""
        bad = torch.ones((), dtype=torch.bool, device=device)
        self._buffers.restore(bad)
        self._batch_bad, self._forward_bad = bad, None

    def forget_batch(self) -> None:
        """The batches of this step are going to be trained again: what they were judged does not count."""
        self._batch_bad = self._forward_bad = self._written = None

    def settle_batch(self) -> None:
        """Restore metric states; once after `training_step`, once more for what was logged after it."""
        if not self._in_batch:
            return
        if self._batch_bad is None:
            self._judge_forward_alone()
        if self._batch_bad is not None:
            self._metrics.restore(self._batch_bad)

    def _judge_forward_alone(self) -> None:
        """A forward pass whose backward pass was not seen: the buffers can tell, and what it logged."""
        bad = self._forward_alone_bad()
        if self._rejected is not None:
            rejected = self._rejected > 0
            bad = rejected if bad is None else bad | rejected.to(bad.device)
        if bad is not None:
            self._buffers.restore(bad)
            self._batch_bad = self.forward_alone_bad = bad

    def _forward_alone_bad(self) -> Tensor | None:
        written = self._buffers.nonfinite()
        if written is not None:
            self._written = either(self._written, written)
        bad, logged = None if written is None else written[0], self._metrics.nonfinite()
        if logged is not None and self._unseen is not None:
            # (a finite step may log what is not finite on purpose)
            logged = logged & (self._unseen > 0).to(logged.device)
        if logged is not None:
            bad = logged if bad is None else bad | logged.to(bad.device)
        return bad

    def note_metrics(self) -> None:
        """A bad batch's part in the metrics has been given back already: what it logs from now on goes back to this."""
        self._metrics.remember()

    def settle_all(self) -> None:
        """Before metrics are computed or saved: nothing of a bad batch may be left in them."""
        self.settle_batch()
        self._metrics.trim()

    def end_epoch(self) -> None:
        """The epoch's metrics are computed and reset next."""
        self.settle_all()
        self._in_batch = False

    def take_left_out(self) -> set[str]:
        """Keys of metrics that only bad batches fed."""
        return self._metrics.take_left_out()

    def rescan(self) -> None:
        """An epoch begins: modules, buffers and metrics may be others, once its hooks have run."""
        self._rescan_due = True

    def after_step(self) -> None:
        """An optimizer has written the weights: that is no writing of the forward pass."""
        if self._watch_writes and self._in_batch:
            self._buffers.note_versions()

    def end_step(self, optimizer: Optimizer) -> None:
        """A step is over, made or not: gradients from before it are gone."""
        self._stepped.add(optimizer)
        self._rejected_before.pop(optimizer, None)

    def forget(self, optimizer: Optimizer) -> None:
        """It will step no more."""
        self._stepped.discard(optimizer)
        self._rejected_before.pop(optimizer, None)
        self._bad_in_a_row.pop(optimizer, None)

    def keep(self, parameters: Iterable[Tensor]) -> None:
        """Keep copies of these parameters too: they are written outside of the optimizer."""
        self._buffers.keep(parameters)

    def copy_of(self, name: str) -> Tensor | None:
        """What a buffer or parameter was before the newest batch; None if it is not kept."""
        return self._buffers.copy_of(name)

    def name_of_buffer(self, index: float) -> str:
        """The buffer that a verdict points at."""
        return self._buffers.name_at(int(index))

    # A step.

    def judge(
        self,
        optimizer: Optimizer,
        total_norm: Tensor,
        largest: float,
        scale: Tensor | None,
        loss: Tensor | None,
        options_finite: bool = True,
        spike: Tensor | None = None,
    ) -> Verdict:
        """Decide on the device whether a step is good."""
        limit = largest if scale is None else largest * scale.to(total_norm.dtype)
        good = total_norm <= limit  # false for nan
        forward_alone = None
        if loss is None and self._in_batch:
            if not self._module.automatic_optimization:  # `loss.backward()`: the gradients tell
                self._unseen = good.logical_not().float()
            forward_alone = self._forward_alone_bad()
        written, self._written = self._written, None
        forward_good: Tensor | None = None
        if not self._distributed:
            if loss is not None:
                of_loss = self._counted_good if loss is self._counted else None
                forward_good = (_finite(loss) if of_loss is None else of_loss).to(good.device)
            elif forward_alone is not None:
                forward_good = forward_alone.to(good.device).logical_not()
            if written is not None:
                forward_good = _and_not(forward_good, written[0].to(good.device))
        if not options_finite:
            forward_good = torch.zeros_like(good)
        bad = (good if forward_good is None else good & forward_good).logical_not().float()
        rejected = self.rejection_of(optimizer)
        if rejected is not None:
            rejected = rejected.to(bad.device)
        if spike is not None:
            self._leave_out(spike)
        return Verdict(bad=bad, forward_good=forward_good, buffer=written, rejected=rejected, spike=spike)

    def _leave_out(self, spike: Tensor) -> None:
        """What the step's last batch has written is restored if it is a spike; so are metrics, with its verdict."""
        if self._in_batch and self._batch_bad is not None:
            flag = (spike > 0).to(self._batch_bad.device)
            self._buffers.restore(self._batch_bad | flag)
            self._batch_bad = self._batch_bad | flag

    def judge_again(self, verdict: Verdict, total_norm: Tensor) -> None:
        """Take back a good verdict if the gradients have become bad since."""
        verdict.bad = torch.maximum(verdict.bad, torch.isfinite(total_norm).logical_not().float())

    @contextmanager
    def decide(self, optimizer: Optimizer, verdict: Verdict) -> Iterator[bool]:
        """Around the optimizer's own step: yields whether the host shall call it."""
        verdict.found_inf = getattr(optimizer, "found_inf", None)
        if not decides_on_device(optimizer):
            verdict.skipped = bool(verdict.unwanted)
            yield not verdict.skipped
            return
        found_inf = verdict.unwanted
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

    def release(self) -> None:
        """The host has answered to a bad step: updates are held no longer, and a row of bad ones begins anew."""
        self._held = None
        self._bad_in_a_row.clear()

    def _hold(self, optimizer: Optimizer, verdict: Verdict) -> Tensor:
        """Count bad steps on the device; from one too many on, hold every update."""
        counted = verdict.bad
        if optimizer not in self._bad_in_a_row:
            self._bad_in_a_row[optimizer] = torch.zeros_like(counted)
        row = self._bad_in_a_row[optimizer]
        # what GradScaler answers, what was rejected, or a spike, is neither counted nor does it end a row
        passed_over = None if verdict.found_inf is None else verdict.found_inf.to(row.device) * verdict.ordinary
        if (unwanted := verdict.passed_over) is not None:
            passed_over = unwanted if passed_over is None else torch.maximum(passed_over, unwanted)
        if passed_over is None:
            torch.addcmul(counted, row, counted, out=row)  # (row + 1) where it counts, else 0
        else:
            row.copy_(torch.where(passed_over > 0, row, (row + 1.0) * counted))
        verdict.held = torch.zeros_like(row) if self._held is None else self._held
        over = (row > self.patience).float()
        self._held = over if self._held is None else torch.maximum(self._held, over)
        return self._held


def _finite(loss: Tensor) -> Tensor:
    """Whether all of it is finite, 0-dimensional; by half the launches of `torch.isfinite`."""
    finite = loss.abs() < torch.inf
    return finite.all() if finite.dim() else finite


def _and_not(a: Tensor | None, b: Tensor) -> Tensor:
    return b.logical_not() if a is None else a > b  # one launch, for flags


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
