"""The session: one per Trainer and fit. It receives Lightning's hooks, and shows the policies each step.

A callback of ours joins it in `setup`. The session puts itself first into `trainer.callbacks` for as long as the fit
lasts, so that no callback has to pass a hook on to it. `watch.py` has what happens inside a step, `dispatch.py` how the
policies hear of it.
"""

from __future__ import annotations

import contextlib
import math
import operator
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_stability import internals
from lightning_stability._compat import Callback
from lightning_stability.events import EventLog
from lightning_stability.health import StepRecord
from lightning_stability.runtime.absent_metrics import AbsentMetrics
from lightning_stability.runtime.counts import Counts
from lightning_stability.runtime.dispatch import Dispatch
from lightning_stability.runtime.lifecycle import Lifecycle
from lightning_stability.runtime.pipeline import Pipeline
from lightning_stability.runtime.policies import Policy
from lightning_stability.runtime.record import Limits, SpikeLimits
from lightning_stability.runtime.trainers import epochs_are_as_long_on_all_ranks, log_folder, refuse_strategy
from lightning_stability.runtime.watch import Watch
from lightning_stability.runtime.windows import BadStep


class Session(Callback):
    """What the callbacks of one Trainer share during one fit.

    Args:
        trainer: A Trainer of either namespace, inside `setup`.
    """

    min_loss_scale = 1.0
    """A skip at a loss scale below this is not ordinary: halving has not helped."""

    max_consecutive_skips = 20
    """More ordinary skips in a row than this are not ordinary."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = weakref.ref(trainer)
        self._user_callbacks = trainer.callbacks
        self._between_steps: deque[tuple[Callable[[], None], bool]] = deque()
        self._lifecycle = Lifecycle()
        self._absent_metrics = AbsentMetrics()
        self.has_begun = False
        self.all_end_epochs_at_once = False
        """Whether all ranks are known to end an epoch after the same batch, and may ask each other something there."""
        self.events = EventLog(log_folder(trainer), trainer.global_rank)
        self.dispatch = Dispatch(self._trainer, self.events)
        limits = Limits(self.min_loss_scale, self.max_consecutive_skips)
        self.watch = Watch(self._trainer, self.dispatch, limits, self.is_ours)
        trainer.callbacks = [self, *trainer.callbacks]

    # The policies' side.

    @classmethod
    def join(cls, trainer: Any, policy: Policy) -> Session:
        """Register a policy with the Trainer's session, which is made if this is the first.

        Args:
            trainer: A Trainer of either namespace, inside `setup`.
            policy: Usually the callback.

        Raises:
            MisconfigurationException: If the policy needs gradients and the Trainer's strategy hides them.
        """
        session = session_of(trainer)
        if session is not None and (session.has_begun or policy in session.dispatch.policies):
            session.close()  # left over from a fit that ended without teardown
            session = None
        if policy.reads_steps:
            refuse_strategy(trainer)
        if session is None:
            session = cls(trainer)
        session.dispatch.add(policy)
        if session.dispatch.need_hooks and not session.watch.is_hooked:
            session.watch.hook()
        session.watch.pipeline.reads.every = session.dispatch.read_every
        return session

    def leave(self, policy: Policy) -> None:
        """Take a policy out, and what was done for it alone."""
        if policy not in self.dispatch.policies:
            return
        self.dispatch.policies.remove(policy)
        others = [
            (call, copies) for call, copies in self.watch.subscribers if getattr(call, "__self__", None) is not policy
        ]
        self.watch.subscribers[:] = others
        if not self.dispatch.need_hooks:
            self.watch.stop()
        elif self.has_begun:
            self.watch.arrange()

    def subscribe(
        self, listener: Callable[[BadStep], None], most_batches: float = math.inf, copies: bool = False
    ) -> None:
        """Have a listener shown every bad step whole, before any policy hears of it. In `setup`, once.

        Args:
            most_batches: Batches of an accumulation window above which they need not be kept.
            copies: Whether it needs the state from before the window. Buffers and metric states are then copied
                before each. It is shown a step as it failed first, also one that training it again has cured, and
                one that was rejected for its input; without copies, a step that is skipped in the end.
        """
        self.watch.subscribers.append((listener, copies))
        self.watch.most_batches = max(self.watch.most_batches, most_batches)

    def between_steps(self, action: Callable[[], None], restores: bool = True) -> None:
        """Run an action as soon as no optimizer step is under way, for example to restore an earlier state.

        It runs at the end of the batch, before any other callback's hook, and not inside an accumulation window.

        Args:
            restores: Whether it restores an earlier state. What the session knows of the steps before is dropped then:
                gradients, losses, copies of buffers and metrics. Until it has run, `restores_next` is true.
        """
        self._between_steps.append((action, restores))

    @property
    def restores_next(self) -> bool:
        """Whether an earlier state is about to be restored: what has happened since then ends no run."""
        return any(restores for _, restores in self._between_steps)

    def set_limits(self, optimizer: int, norm: Tensor, loss: Tensor | None = None) -> None:
        """Skip this optimizer's steps whose gradient norm or loss is above a limit, decided where the limits are.

        Where several processes train, the norm alone decides: it is the same for all of them.

        Args:
            optimizer: Its index in `trainer.optimizers`.
            norm: 0-dimensional, of the true gradients. Whoever has set it may write it in place at any time.
            loss: The same for the window's mean loss.
        """
        self.watch.pipeline.spike_limits[optimizer] = SpikeLimits(norm, loss)

    def reject_batch(self, rejected: Tensor, by: str) -> None:
        """The batch that has begun is not to be trained on: its window's update is discarded.

        Args:
            rejected: 1.0 if that is so; 0-dimensional, and the same on all ranks.
            by: Who says so, for the event.
        """
        self.dispatch.rejected_by = by
        if self.watch.guard is not None:
            self.watch.guard.reject(rejected)

    def recent_batch(self, record: StepRecord) -> Any:
        """The batch that a record names, if it is still held; else None."""
        return self.watch.recent_batch(record)

    def restore_contents(self) -> tuple[list[str], list[str]]:
        """Restore what the module holds that became non-finite: names of what was restored, and what could not be."""
        return self.watch.restore_contents()

    def use_plugin(self, plugin: Any) -> None:
        """Train with another precision plugin from now on."""
        self.watch.use_plugin(plugin)

    def end(self, why: str | None = None) -> None:
        """A policy ends the run: held updates stay held. With a reason, for the event, once it is announced."""
        self.watch.ending = True
        if why is not None:
            self._lifecycle.stopped(why)

    def drain(self) -> None:
        """Wait for the records of all steps so far and hand them to the policies."""
        self.watch.drain()

    @property
    def trainer(self) -> Any:
        """The Trainer."""
        trainer = self._trainer()
        assert trainer is not None, "a session does not outlive its Trainer"
        return trainer

    @property
    def counts(self) -> Counts:
        """What became of the updates."""
        return self.dispatch.counts

    @property
    def pipeline(self) -> Pipeline:
        """Where steps are measured."""
        return self.watch.pipeline

    @property
    def uncast(self) -> Any:
        """The batch that has begun, as it was before fp16 cast it; None if it was not cast."""
        return self.watch.uncast

    @property
    def can_skip_a_batch(self) -> bool:
        """Whether a batch on which `training_step` has raised can be left out."""
        return self.watch.can_skip_a_batch

    def is_ours(self) -> bool:
        """Whether the run is training; the learning-rate and batch-size finders do it with other callbacks."""
        trainer = self._trainer()  # gone, if a scheduler has kept our stand-in in an optimizer that outlives it
        if trainer is None:
            return False
        callbacks = trainer.callbacks
        # (it is the first one, but for those that somebody has added since)
        return bool(callbacks) and (callbacks[0] is self or any(callback is self for callback in callbacks))

    # Lightning's hooks.

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """All callbacks are set up."""
        self.has_begun = True
        if self.dispatch.asked_for:
            self._lifecycle.prepare(trainer, self.events)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything is set up and restored."""
        self._lifecycle.started(trainer, [callback for callback in trainer.callbacks if callback is not self])
        self.dispatch.start()
        self.all_end_epochs_at_once = bool(self.dispatch.contain(epochs_are_as_long_on_all_ranks, trainer))
        if self.watch.is_hooked:
            self.dispatch.contain(self.watch.start)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Modules, buffers and metrics may be others."""
        self._absent_metrics.restore()
        self.dispatch.contain(self.watch.begin_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A batch is about to enter `training_step`."""
        self.dispatch.contain(self.watch.begin_batch, batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """`training_step` and its optimizer steps are through, and no validation or save has come yet."""
        self.dispatch.contain(self.watch.end_batch, self.restores_next)
        if not internals.window_is_open(trainer):
            self.act_between_steps()
        self.dispatch.write_progress(batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Read what is on its way, so that an epoch's numbers are there when it ends."""
        self.dispatch.contain(self.watch.end_epoch)
        if self.watch.guard is not None:
            self.dispatch.contain(self._absent_metrics.leave_out, trainer, self.watch.guard.take_left_out())
        self.dispatch.contain(self.watch.check_contents, self.all_end_epochs_at_once)
        self.act_between_steps()
        self.dispatch.write_progress(internals.batch_index(trainer), always=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Read what is on its way, before the loggers are closed."""
        self.dispatch.contain(self.watch.drain)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """No checkpoint holds what a bad step has left in a metric."""
        if self.has_begun:
            self.dispatch.contain(self.watch.drain)
            self.dispatch.contain(self.watch.check_contents, trainer.world_size == 1)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Read what is on its way, which may say why: after an exception Lightning calls no teardown."""
        with contextlib.suppress(RuntimeError):  # a device that failed must not hide what made it fail
            self.dispatch.contain(self.watch.drain)
        self._end_policies(exception)
        self._lifecycle.failed(trainer, exception)
        self.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The fit is over."""
        self._end_policies(None)
        if stage == "fit":
            self._lifecycle.ended(trainer)
        self.close()

    def close(self) -> None:
        """Restore the Trainer as it was and drop what was not read."""
        self.watch.stop()
        self._absent_metrics.restore()
        for policy in self.dispatch.policies:
            policy.session = None
        self.dispatch.policies.clear()
        trainer = self._trainer()
        if trainer is None:
            return
        others = [callback for callback in trainer.callbacks if callback is not self]
        # the user's own list object again, if nothing else has changed
        same = len(others) == len(self._user_callbacks) and all(map(operator.is_, others, self._user_callbacks))
        trainer.callbacks = self._user_callbacks if same else others

    def act_between_steps(self) -> None:
        """No step is under way now: run what waits for that."""
        while self._between_steps:
            action, restores = self._between_steps.popleft()
            self.dispatch.contain(action)
            if restores:
                self.watch.forget_steps()
                self.counts.bad_in_a_row.clear()

    def _end_policies(self, exception: BaseException | None) -> None:
        for policy in list(self.dispatch.policies):
            self.dispatch.contain(policy.on_session_end, exception, policy=policy)

    def __reduce__(self) -> tuple[Any, ...]:
        # A list of callbacks that is pickled in the middle of a fit must load where this package is not.
        base = next(cls for cls in type(self).__mro__ if cls.__module__.endswith("callbacks.callback"))
        return base, ()


def session_of(trainer: Any) -> Session | None:
    """The Trainer's session, while a fit goes on with one of our callbacks."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Session)), None)
