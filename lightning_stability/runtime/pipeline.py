"""One optimizer step from its first backward pass to its record.

on_loss         a backward pass begins: its loss is one of the step's
measure         the gradients are final but for clipping: one pass takes their norms, the guard judges
decide          the optimizer is called: let it, or not
on_step_end     the numbers are sent to the host
_arrived        they are there: classified, and delivered as a record
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_stability import internals
from lightning_stability._compat import MisconfigurationException, is_overridden
from lightning_stability.health import GradientMeter, LateReads, Measurement, StepRecord
from lightning_stability.health.buckets import shard_groups
from lightning_stability.health.forward_order import forward_order
from lightning_stability.health.loss_scale import clear_found_inf_, scale_tensor, unscales_itself
from lightning_stability.recovery import Guard
from lightning_stability.runtime.exchange import exchange_flags
from lightning_stability.runtime.options import nonfinite_option
from lightning_stability.runtime.record import (
    HELD,
    NO_LOSS,
    REJECTED,
    SPIKE,
    Limits,
    Losses,
    Outcome,
    SpikeLimits,
    Step,
    classify,
)
from lightning_stability.runtime.trainers import clips_by_norm, is_clipped_to_the_bit
from lightning_stability.runtime.update import Gate, GuardedStep


class Pipeline:
    """Measures each step once, has the guard judge it, and makes its record.

    Args:
        trainer: The Trainer.
        limits: What separates an ordinary skip from a bad step.
        deliver: Gets each record, in order, once its numbers are on the host.
        is_active: Whether steps are to be measured now.
        wants_update: Whether the sizes of this logger step's update and weights are wanted.
        is_automatic: Whether nobody has asked for any of this.
        refuse: Called where an optimizer cannot be guarded.
    """

    def __init__(
        self,
        trainer: Any,
        limits: Limits,
        deliver: Callable[[StepRecord], None],
        is_active: Callable[[], bool],
        wants_update: Callable[[int], bool],
        is_automatic: Callable[[], bool],
        refuse: Callable[[MisconfigurationException], None],
    ) -> None:
        self._trainer = trainer
        self._limits = limits
        self._deliver = deliver
        self._is_active = is_active
        self._wants_update = wants_update
        self._is_automatic = is_automatic
        self.refuse = refuse
        self.guard: Guard | None = None
        self.read_lag: int | None = None
        """How many steps may be under way while the host waits for older ones; None to wait for none."""
        self.gate: Gate = self
        """What an optimizer's step asks: this pipeline, or what stands for it."""
        self.reads = LateReads()
        self.spike_limits: dict[int, SpikeLimits] = {}
        """By the optimizer's index."""
        self.meters: dict[Optimizer, GradientMeter] = {}
        self.losses = Losses()
        self._last_losses = Losses()
        self._step: Step | None = None
        self._early: Step | None = None  # measured before `step` was called, since the module clips by itself
        self._unknown: Optimizer | None = None  # an optimizer whose step Lightning does not know of
        self._guarded: dict[Optimizer, GuardedStep] = {}
        self._stepped_in = 0  # number of the batch that had the newest step
        self._skips_in_a_row: dict[int, int] = {}
        self._forward_order: dict[str, int] = {}
        self._positions: dict[str, int] = {}
        self._distributed = trainer.world_size > 1

    # The fit.

    def watch(self, optimizer: Optimizer) -> bool:
        """Be asked when this optimizer steps, from now on. Returns whether it was not so before."""
        automatic, is_new = self._trainer.lightning_module.automatic_optimization, optimizer not in self._guarded
        if is_new:
            self._guarded[optimizer] = GuardedStep(optimizer, self.gate, lambda: automatic)
        return is_new

    def forget(self, optimizer: Optimizer) -> None:
        """It will step no more, or be watched anew."""
        self.meters.pop(optimizer, None)
        self._guarded.pop(optimizer).remove()
        if self.guard is not None:
            self.guard.forget(optimizer)

    def remove(self) -> None:
        """Restore the optimizers and drop what was not read."""
        for guarded in self._guarded.values():
            guarded.remove()
        self._guarded.clear()
        self.reads.drop()
        self.guard = None

    def forget_precision(self) -> None:
        """The precision is another one: norms are measured anew, and a row of skips begins anew."""
        self.meters.clear()
        self._skips_in_a_row.clear()

    def forget_losses(self) -> None:
        """The backward passes since the last step do not count: they are going to be run again."""
        self.losses = Losses()

    # One step, in order.

    def on_loss(self, loss: Tensor) -> Tensor:
        """A backward pass begins at this loss. Returns what is counted of it, 0-dimensional."""
        if self.guard is not None and not self._forward_order:
            names = {parameter: name for name, parameter in self._trainer.lightning_module.named_parameters()}
            self._forward_order = forward_order(loss, names) or {"": 0}
        loss = loss.detach()
        if loss.dim():
            loss = loss.sum()
        elif not self._trainer.lightning_module.automatic_optimization:
            loss = loss.clone()  # it is the user's tensor; in automatic optimization Lightning just made it
        self.add_loss(loss)
        return loss

    def add_loss(self, loss: Tensor) -> None:
        """Count a loss, 0-dimensional, to the step that comes."""
        self.losses.add(loss, internals.batch_number(self._trainer), internals.batch_index(self._trainer))

    def on_step_begin(self, optimizer: Optimizer) -> None:
        """A step begins; its closure, if it has one, has not run yet."""
        early, self._early = self._early, None
        self._step = None
        if self._is_active():
            self._step = early if early is not None and early.optimizer is optimizer else Step(optimizer)
            self.watch(optimizer)

    def on_own_clipping(self, optimizer: Optimizer) -> None:
        """The module is about to clip by itself, maybe before it steps: the norm is taken before."""
        if self._step is not None or not self._is_active() or optimizer not in self._guarded:
            return
        self._early = self._step = Step(optimizer)
        self.measure(optimizer)
        self._step = None

    def measure(self, optimizer: Optimizer) -> None:
        """Take the gradients' norms as they are now, and have the step judged."""
        step = self._step
        if step is None or step.optimizer is not optimizer:
            return
        if step.meter is not None:  # the module has clipped by itself
            if self.guard is not None and step.verdict is not None:
                self.guard.judge_again(step.verdict, step.meter.total_norm_now())
            return
        meter = self._meter(optimizer)
        scale = scale_tensor(self._trainer.precision_plugin)
        scalars = dict(step.learning_rates_on_device())
        if scale is not None:
            scalars["loss_scale"] = scale
        self._close_losses(step)
        kept = {} if step.losses.total is None else {"loss": step.losses.total}
        if self.guard is not None and step.losses.batches > 1:
            kept["bad_batch"] = step.losses.first_nonfinite()
        meter.measure(scalars, kept, force=True)
        step.scaled = scale is not None
        step.divide_by_scale = scale is not None and unscales_itself(optimizer)
        step.logger_step = internals.logger_step(self._trainer)
        if self._wants_update(step.logger_step):
            meter.remember_weights()
        step.meter = meter
        if self.guard is not None:
            step.bad_option = nonfinite_option(optimizer)
            norm, divisor, loss = meter.total_norm(), scale if step.divide_by_scale else None, step.losses.total
            limits = self.spike_limits.get(self._index_of(optimizer)) if self.spike_limits else None
            step.verdict = self.guard.judge(
                optimizer,
                norm,
                meter.largest_norm,
                divisor,
                loss,
                options_finite=step.bad_option is None,
                # (each rank has a loss of its own; the norm is that of all)
                spike=None if limits is None else limits.exceeded(norm, divisor, None if self._distributed else loss),
            )
            self._clear_rejected_inf(step)

    def on_clipped(self, optimizer: Optimizer) -> None:
        """A module that clips in its own way may have spoilt its gradients: look at them once more."""
        step = self._step
        if step is None or step.meter is None or step.verdict is None or step.optimizer is not optimizer:
            return
        if is_overridden("configure_gradient_clipping", self._trainer.lightning_module):
            assert self.guard is not None
            self.guard.judge_again(step.verdict, step.meter.total_norm_now())

    def clips(self, optimizer: Optimizer, max_norm: float) -> bool:
        """Clip with the norm measured just before; False if there is none that may be used."""
        step = self._step
        if step is None or step.meter is None or step.optimizer is not optimizer or not step.meter.drives_clipping:
            return False
        if self._is_automatic() and step.meter.has_sparse:  # Lightning refuses to clip those
            return False
        step.meter.clip_(float(max_norm))
        return True

    # The optimizer's call (`update.Gate`).

    def before_update(self, optimizer: Optimizer) -> bool:
        """The optimizer has been called."""
        if not self._is_active():
            return False
        if self.guard is None:
            if self._step is not None and self._step.optimizer is optimizer:
                self._step.called = True
                self._step.found_inf = getattr(optimizer, "found_inf", None)
            return False
        if self._step is None:
            self._unknown = optimizer  # `optimizers(use_pl_optimizer=False)`, or an optimizer of the module's own
            self.on_step_begin(optimizer)
        return True

    def decide(self, optimizer: Optimizer) -> AbstractContextManager[bool] | None:
        """Whether the update goes ahead."""
        step, guard = self._step, self.guard
        if step is None or guard is None:
            return None
        if step.meter is None:
            self.measure(optimizer)
        if step.verdict is None or step.optimizer is not optimizer:  # a second optimizer inside of the first's step
            return None
        step.called = True
        self._clear_rejected_inf(step)
        return self._decided(guard, step)

    @contextmanager
    def _decided(self, guard: Guard, step: Step) -> Any:
        assert step.verdict is not None
        with guard.decide(step.optimizer, step.verdict) as goes_ahead:
            yield goes_ahead
        step.found_inf = step.verdict.found_inf
        guard.after_step()

    def after_update(self, optimizer: Optimizer) -> None:
        """The optimizer's call is over."""
        if self._unknown is optimizer:
            self._unknown = None
            self.on_step_end()

    def on_step_end(self) -> None:
        """The optimizer has stepped, or was kept from it: send the numbers to the host."""
        step, self._step = self._step, None
        if step is None or step.meter is None:
            return
        self._stepped_in = self._stepped_in if step.left_out else internals.batch_number(self._trainer)
        if self.guard is not None:
            self.guard.end_step(step.optimizer)
        for name, scalar in step.late_scalars().items():
            step.meter.put(name, scalar)
        # The progress counters have not moved yet: Lightning does it after us.
        step.step, step.epoch = self._trainer.global_step, self._trainer.current_epoch
        step.index = self._index_of(step.optimizer)
        step.meter.send(self.reads, lambda measured: self._arrived(step, measured))
        skipped = not step.called or (step.verdict is not None and bool(step.verdict.skipped))
        if self.guard is None:
            self.reads.poll()
        elif skipped:
            self.reads.drain()  # somebody may have to act on it at this very step
        elif self.read_lag is not None:
            self.reads.drain(keep=self.read_lag)
        elif self._distributed:
            # All ranks have to hear of a step after the same number of steps. (Lightning itself reads a flag from
            # the device at every step of a distributed run.)
            self.reads.drain(keep=0 if step.scaled else 1)
        else:
            self.reads.poll()

    def end_batch(self) -> None:
        """In manual optimization: count a bad batch that the module leaves out, after one that it has trained."""
        guard, optimizer = self.guard, next(iter(self._guarded), None)
        automatic = self._trainer.lightning_module.automatic_optimization
        if guard is None or optimizer is None or self._distributed or automatic:
            return
        guard.settle_batch()
        flag, follows_a_step = guard.forward_alone_bad, self._stepped_in == internals.batch_number(self._trainer) - 1
        if flag is None or not follows_a_step or not bool(flag):
            return
        self.on_step_begin(optimizer)
        self.measure(optimizer)
        step = self._step
        if step is None or step.meter is None or step.verdict is None or not bool(step.meter.total_norm().isfinite()):
            self._step = None  # the gradients wait for a step, which will tell
        else:
            step.verdict.skipped = step.called = step.left_out = True
            self.on_step_end()

    def _arrived(self, step: Step, measured: Measurement) -> None:
        """A step's numbers are on the host: complete its record, say what became of it, and hand it over."""
        record, guard = step.record(measured), self.guard
        if guard is not None:
            if record.buffer_index is not None:
                record.nonfinite_buffer = guard.name_of_buffer(record.buffer_index)
            if record.skipped_by not in (None, NO_LOSS, REJECTED, HELD, SPIKE):
                record.bad_loss_ranks = self._ranks_with_bad_loss(record)
        if not record.gradients_finite:
            record.culprit = self._culprit(record)
        skips = self._skips_in_a_row.get(record.optimizer, 0)
        outcome = record.outcome = classify(record, skips, self._limits)
        if outcome is Outcome.APPLIED:
            self._skips_in_a_row[record.optimizer] = 0
        elif outcome is Outcome.ORDINARY_SKIP:
            self._skips_in_a_row[record.optimizer] = skips + 1
        self._deliver(record)

    # Parts of the above.

    def _meter(self, optimizer: Optimizer) -> GradientMeter:
        meter = self.meters.get(optimizer)
        if meter is None or not meter.is_current():
            names = {parameter: name for name, parameter in self._trainer.lightning_module.named_parameters()}
            self._positions = {name: position for position, name in enumerate(names.values())}
            if meter is not None:
                self._forward_order = {}
            drives = is_clipped_to_the_bit(optimizer) or not self._is_automatic()
            groups = shard_groups(self._trainer.strategy.model)
            meter = GradientMeter(optimizer, names, drives and clips_by_norm(self._trainer), groups=groups)
            self.meters[optimizer] = meter
        return meter

    def _close_losses(self, step: Step) -> None:
        """The backward passes that this step's gradients come from."""
        number, index = internals.batch_number(self._trainer), internals.batch_index(self._trainer)
        if self.losses.batches:
            self._last_losses, self.losses = self.losses, Losses()
        elif self._trainer.lightning_module.automatic_optimization:
            self._last_losses = Losses()
        elif self._last_losses.numbers[-1:] != [number]:
            # `loss.backward()` instead of `self.manual_backward(loss)`
            self._last_losses = Losses(numbers=[number], indices=[index])
            self._refuse_unreduced()
        # else: a second optimizer stepping on the same backward pass
        step.losses = self._last_losses

    def _refuse_unreduced(self) -> None:
        if self.guard is not None and self._distributed:
            self.refuse(
                MisconfigurationException(
                    "an optimizer steps after a backward pass that did not go through `self.manual_backward(loss)`:"
                    " Lightning then does not reduce the gradients, so the ranks train different weights and cannot"
                    " skip the same updates. Call `self.manual_backward(loss)` in place of `loss.backward()`"
                )
            )

    def _clear_rejected_inf(self, step: Step) -> None:
        """GradScaler shall not halve its scale for an input that has been rejected.

        Called after it has looked: it does so in `unscale_`, or, for optimizers that unscale themselves, in its `step`.
        """
        if step.verdict is not None and step.verdict.rejected is not None:
            clear_found_inf_(self._trainer.precision_plugin, step.optimizer, step.verdict.rejected)

    def _index_of(self, optimizer: Optimizer) -> int:
        return next((i for i, candidate in enumerate(self._trainer.optimizers) if candidate is optimizer), 0)

    def _ranks_with_bad_loss(self, record: StepRecord) -> tuple[int, ...]:
        """The ranks on which the loss or a buffer was not finite."""
        bad = not record.loss_finite or record.nonfinite_buffer is not None
        if not self._distributed:
            return (0,) if not record.loss_finite else ()
        flags = exchange_flags(f"step {record.step} of optimizer {record.optimizer}", bad, self._trainer)
        return tuple(rank for rank, flag in enumerate(flags) if flag)

    def _culprit(self, record: StepRecord) -> str | None:
        """The parameter whose gradient became non-finite first: behind it, nearer to the loss, it was finite."""
        names = record.parameter_names
        if record.gradients == "overflow":
            return names[int(record.grad_norms.argmax())]
        bad = [name for name, norm in zip(names, record.grad_norms.tolist(), strict=True) if not math.isfinite(norm)]
        if not bad:
            return None
        return max(bad, key=lambda name: (self._forward_order.get(name, -1), self._positions.get(name, -1)))
