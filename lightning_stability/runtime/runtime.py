"""One object per Trainer and fit: it owns the hooks into the step and shows its policies one record of each step.

The first callback's `setup` makes it, the last one's `teardown` removes it. In between it stands in (`taps.py`) for
methods of the Trainer's precision plugin, as attributes of that instance, so that the plugin keeps its class, which
checkpoints are keyed by, and for `step` of each optimizer (`stepping.py` follows one such step):

    convert_input       the batch, before a 16-true precision casts it
    pre_backward        the loss, before GradScaler multiplies it
    post_backward       the forward pass is judged: what it wrote stays or goes
    _clip_gradients     the last point before clipping: after `unscale_`, after every `on_before_optimizer_step`
    clip_grad_by_norm   clips with the norm just measured
    optimizer_step      the whole step; afterwards the record is on its way to the host
    Optimizer.step      the update itself: everybody's last gate, also with `use_pl_optimizer=False`
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stability._compat import MisconfigurationException
from lightning_stability.events import EventLog
from lightning_stability.health import GradientMeter, LateReads, StepRecord
from lightning_stability.recovery import Guard
from lightning_stability.runtime.outcomes import Outcomes
from lightning_stability.runtime.policies import Policy
from lightning_stability.runtime.retries import Retries
from lightning_stability.runtime.run_events import RunEvents
from lightning_stability.runtime.stepping import Stepping
from lightning_stability.runtime.steps import RecordDraft
from lightning_stability.runtime.taps import PluginTap
from lightning_stability.runtime.trainers import (
    log_folder,
    refuse_optimizer,
    refuse_strategy,
    say_what_it_costs,
    validation_is_due,
)


class Runtime:
    """Measures each optimizer step of one Trainer once, for all policies.

    Args:
        trainer: A Trainer of either namespace, inside `setup`.

    Raises:
        MisconfigurationException: If the Trainer's strategy hides the gradients.
    """

    min_loss_scale = 1.0
    """A skip at a scale below this is no ordinary one: halving has not helped."""

    max_consecutive_skips = 20
    """More ordinary skips in a row than this are no ordinary ones."""

    def __init__(self, trainer: Any) -> None:
        refuse_strategy(trainer)
        self._trainer = weakref.ref(trainer)
        self.guard: Guard | None = None
        self._distributed = trainer.world_size > 1
        self.outcomes = Outcomes(self)
        self.retries: Retries | None = None
        self._recent: deque[tuple[int, Any]] = deque(maxlen=2)
        self._policies: list[Policy] = []
        self._reads = LateReads()
        self.steps = Stepping(self)
        self.uncast: Any = None
        self.events = EventLog(log_folder(trainer), trainer.global_rank)
        self._tap = PluginTap(trainer.strategy.precision_plugin, self)

    # The policies' side.

    @classmethod
    def attach(cls, trainer: Any, policy: Policy) -> Runtime:
        """Register a policy with the Trainer's runtime, which is made if this is the first.

        Args:
            trainer: A Trainer of either namespace, inside `setup`.
            policy: Usually the callback.
        """
        runtime = _RUNTIMES.get(trainer)
        if runtime is not None and policy in runtime._policies:
            runtime.close()  # left over from a fit that ended without teardown
            runtime = None
        if runtime is None:
            runtime = _RUNTIMES[trainer] = cls(trainer)
        runtime._policies.append(policy)
        runtime._reads.every = min(policy.read_every for policy in runtime._policies)
        return runtime

    def prepare(self) -> None:
        """All callbacks are set up."""
        if any(policy.asked_for for policy in self._policies):
            RunEvents.of(self.trainer).prepared(self.trainer, self.events)

    def start(self, module: Any) -> None:
        """Training starts: everything is set up and restored.

        Args:
            module: The LightningModule.

        Raises:
            MisconfigurationException: If an optimizer cannot be guarded.
        """
        trainer = self.trainer
        RunEvents.of(trainer).started(trainer)
        for optimizer in trainer.optimizers:
            self.steps.stand_in_for(optimizer)
        if self.guard is None and self._shall_guard():
            self.guard = Guard(module, self.results, self._distributed)
            self.guard.patience = min(policy.patience for policy in self._policies)
            if not all(policy.automatic for policy in self._policies if policy.guards):
                for optimizer in trainer.optimizers:
                    say_what_it_costs(trainer, optimizer)
        retrier: Any = next((policy for policy in self._policies if hasattr(policy, "wants_retry")), None)
        can_retry = self.guard is not None and retrier is not None and retrier.wants_retry()
        if self.retries is None and can_retry:
            assert self.guard is not None
            self.retries = Retries(self, retrier, self.guard, module)
            self._hold_only_without_retries()

    def results(self) -> Any:
        """What `self.log` accumulates in the epoch."""
        return self.trainer.fit_loop.epoch_loop._results

    def _hold_only_without_retries(self) -> None:
        """The device must not hold updates after a bad step that is going to be trained again."""
        assert self.guard is not None
        patience = min(policy.patience for policy in self._policies)
        self.guard.patience = math.inf if self.retries is not None else patience

    def use_plugin(self, plugin: Any) -> None:
        """Train with another precision plugin from now on.

        Args:
            plugin: Of the Trainer's namespace.
        """
        self._tap.remove()
        self.trainer.strategy.precision_plugin = plugin
        self._tap = PluginTap(plugin, self)
        self.steps.meters.clear()
        self.outcomes.forget_skips()
        if self.guard is not None:
            self.guard.rescan()  # buffers may have changed their type

    def begin_batch(self, batch: Any) -> None:
        """A batch is about to enter `training_step`; asked by each callback, done once.

        Args:
            batch: The batch.
        """
        if self.guard is None:
            return
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if not self._recent or self._recent[-1][0] != number:
            self._recent.append((number, batch))
            self.guard.begin_batch()

    def reject_batch(self, rejected: Tensor) -> None:
        """The batch that has begun is not to be trained on: its window's update is discarded.

        Args:
            rejected: 1.0 if that is so; 0-dimensional, and the same on all ranks.
        """
        if self.guard is not None:
            self.guard.reject(rejected)

    def end_batch(self) -> None:
        """`training_step` and its optimizer steps are through, and no validation or save has come yet."""
        self.uncast = None
        if self.guard is not None:
            if self.retries is not None:
                self.tell(*self.retries.take_arrived())
            self.guard.settle_batch()
            if validation_is_due(self.trainer) or self.trainer.is_last_batch:
                self.drain()

    def settle_batch(self) -> None:
        """A forward pass without a backward pass has to be judged before any callback's `on_train_batch_end`."""
        if self.guard is not None and self.is_ours():
            self.guard.settle_batch()

    def begin_epoch(self) -> None:
        """An epoch begins."""
        if self.guard is not None:
            self.guard.rescan()
        if self.retries is not None:
            self.retries.rescan()

    def end_epoch(self) -> None:
        """An epoch ends; its metrics are computed next."""
        self.drain()
        if self.guard is not None:
            self.guard.end_epoch()

    def recent_batch(self, record: StepRecord) -> Any:
        """The batch that a record names, if it is still held; else None.

        Args:
            record: A record that was just handed over.
        """
        return next((batch for number, batch in self._recent if number == record.batch_number), None)

    def detach(self, policy: Policy) -> None:
        """Take a policy out, and what was done for it alone; with the last one the Trainer is as it was before."""
        if policy in self._policies:
            self._policies.remove(policy)
        if not self._policies:
            self.close()
            return
        self._reads.every = min(policy.read_every for policy in self._policies)
        retrier: Any = None if self.retries is None else self.retries.retrier
        if self.retries is not None and retrier is policy:
            self.tell(*self.retries.take_arrived())
            self.retries.remove()
            self.retries = None
        if self.guard is not None and not any(policy.guards for policy in self._policies):
            self.guard = None
        elif self.guard is not None:
            self._hold_only_without_retries()

    def drain(self) -> None:
        """Wait for the records of all steps taken so far and hand them to the policies."""
        if self.guard is not None:
            self.guard.settle_all()
        self._reads.drain()

    def close(self) -> None:
        """Give the Trainer's plugin and optimizers back as they were and drop what was not read."""
        self._tap.remove()
        if self.retries is not None:
            self.retries.remove()
        self.steps.remove()
        self.guard = None
        self._reads.drop()
        trainer = self._trainer()
        if trainer is not None and _RUNTIMES.get(trainer) is self:
            del _RUNTIMES[trainer]

    @property
    def trainer(self) -> Any:
        """The Trainer."""
        trainer = self._trainer()
        assert trainer is not None, "a runtime does not outlive its Trainer"
        return trainer

    @property
    def plugin(self) -> Any:
        """The precision plugin of now."""
        return self._tap.plugin

    # A batch and its step; `stepping.py` has what comes between backward pass and record.

    def note_input(self, batch: Any) -> None:
        """A batch is about to be cast to the precision's own type.

        Args:
            batch: As the loader gave it.
        """
        if self.trainer.training and getattr(self.plugin, "_desired_input_dtype", None) == torch.float16:
            self.uncast = batch
        if self.retries is not None:
            self.retries.note_input(batch)

    def note_loss(self, loss: Tensor) -> None:
        """A backward pass is about to run from this loss.

        Args:
            loss: With its graph.
        """
        if self.guard is not None and self.is_ours():
            self.outcomes.note_loss(loss)
            self.guard.note_loss(loss)
        if self.reads_steps():  # else no step would close the window
            self.steps.note_loss(loss)

    def after_backward(self) -> None:
        """The backward pass is through."""
        if self.guard is not None and self.is_ours():
            self.guard.after_backward()

    def try_step(self, optimizer: Optimizer, model: Any, closure: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        """Step, in the precision of now.

        Args:
            optimizer: The bare torch optimizer.
            model: The LightningModule.
            closure: Runs the forward and backward pass of the window's last batch.
            kwargs: What else `optimizer_step` is called with.
        """
        return self._tap.step(optimizer, model, closure, kwargs)

    def send(self, meter: GradientMeter, draft: RecordDraft, scaled: bool) -> None:
        """Send a step's numbers to the host, and hand over what has arrived.

        Args:
            meter: Holds them.
            draft: Becomes the step's record when they are there.
            scaled: Whether a GradScaler is at work.
        """
        meter.send(self._reads, lambda measurement: self._hand_over(draft.complete(measurement)))
        if self.guard is None:
            self._reads.poll()
        elif draft.skipped_by or draft.skipped_by_guard or self.retries is not None:
            self._reads.drain()  # somebody has to act on it at this very step
        elif self._distributed:
            # All ranks have to hear of a step after the same number of steps. (Lightning itself reads a flag from
            # the device at every step of a distributed run.)
            self._reads.drain(keep=0 if scaled else 1)
        else:
            self._reads.poll()

    # What the policies want of a step.

    def reads_steps(self) -> bool:
        """Whether any has to do with records at all."""
        return any(policy.reads_steps for policy in self._policies)

    def wants_update(self, logger_step: int) -> bool:
        """Whether any wants the sizes of this step's update and weights."""
        return any(policy.wants_update(logger_step) for policy in self._policies)

    def is_automatic(self) -> bool:
        """Whether all came with the environment."""
        return all(policy.automatic for policy in self._policies)

    def refuse_to_guard(self, refusal: MisconfigurationException) -> None:
        """Updates cannot be guarded: automatic policies leave; others refuse.

        Args:
            refusal: Says why.

        Raises:
            MisconfigurationException: If somebody has asked for a guard.
        """
        guarding = [policy for policy in self._policies if policy.guards]
        if not all(policy.automatic for policy in guarding):
            raise refusal
        for policy in guarding:
            policy.stand_aside(self.trainer, refusal)

    # Parts of the above.

    def _shall_guard(self) -> bool:
        """Whether a policy wants updates guarded. If they cannot be, automatic policies leave; others refuse."""
        guarding = [policy for policy in self._policies if policy.guards]
        try:
            for optimizer in self.trainer.optimizers if guarding else ():
                refuse_optimizer(optimizer)
        except MisconfigurationException as refusal:
            self.refuse_to_guard(refusal)
            return False
        return bool(guarding)

    def _hand_over(self, record: StepRecord) -> None:
        if self.guard is not None:
            self.outcomes.complete(record, self.guard)
        if self.retries is None:
            self.tell(record)
        else:
            self.retries.note_record(record)

    def tell(self, *records: StepRecord) -> None:
        """Show the policies what became of steps.

        Args:
            records: In the order of the steps.
        """
        for record in records:
            for policy in list(self._policies):
                policy.on_record(record)

    def is_ours(self) -> bool:
        """Whether the run is training; the learning-rate and batch-size finders do it with other callbacks."""
        trainer = self._trainer()  # gone, if a scheduler has kept our stand-in in an optimizer that outlives it
        return trainer is not None and any(policy in trainer.callbacks for policy in self._policies)


_RUNTIMES: weakref.WeakKeyDictionary[Any, Runtime] = weakref.WeakKeyDictionary()


def runtime_of(trainer: Any) -> Runtime | None:
    """The Trainer's runtime, while one of our callbacks is set up with it."""
    return _RUNTIMES.get(trainer)
