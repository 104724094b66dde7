"""The session: one per Trainer and fit. It receives Lightning's hooks, runs the pipeline, and shows policies each step.

A callback of ours joins it in `setup`. The session puts itself first into `trainer.callbacks` for as long as the fit
lasts, so that no callback has to pass a hook on to it.
"""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stability import internals
from lightning_stability._compat import Callback, MisconfigurationException
from lightning_stability.events import EventLog
from lightning_stability.health import StepRecord
from lightning_stability.internals import Overrides
from lightning_stability.recovery import Guard, MetricUndo
from lightning_stability.recovery.content import Contents
from lightning_stability.recovery.guard import decides_on_device
from lightning_stability.runtime.containment import Contained, contain_hooks
from lightning_stability.runtime.counts import Counts
from lightning_stability.runtime.hooks import PluginHooks
from lightning_stability.runtime.lifecycle import Lifecycle
from lightning_stability.runtime.optimizers import UnknownOptimizers
from lightning_stability.runtime.pipeline import Pipeline
from lightning_stability.runtime.policies import DeliberateError, Policy
from lightning_stability.runtime.record import Limits, Outcome
from lightning_stability.runtime.retry import Retries
from lightning_stability.runtime.trainers import log_folder, refuse_optimizer, refuse_strategy, say_what_it_costs
from lightning_stability.runtime.windows import BadStep, UncastBatch, Windows

_SKIPS = (Outcome.ORDINARY_SKIP, Outcome.BAD, Outcome.REJECTED)
_PROGRESS_SECONDS = 5.0


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
        self._policies: list[Policy] = []
        self._subscribers: list[Callable[[BadStep], None]] = []
        self._between_steps: deque[Callable[[], None]] = deque()
        self._overrides = Overrides()
        self._lifecycle = Lifecycle()
        self._recent: deque[tuple[int, Any]] = deque(maxlen=2)
        self._progress_at = -math.inf
        self._last: StepRecord | None = None
        self._seconds_of_start = time.monotonic()
        self._rejected_by = ""
        self._uncast_for_retry: UncastBatch | None = None
        self._contents: Contents | None = None
        self._hooks: PluginHooks | None = None
        self._unknown: UnknownOptimizers | None = None
        self.has_begun = False
        self.ending = False
        """Set by a policy that ends the run: a held update stays held."""
        self.counts = Counts()
        self.uncast: Any = None
        self.retries: Retries | None = None
        self.events = EventLog(log_folder(trainer), trainer.global_rank)
        self.pipeline = Pipeline(
            trainer,
            Limits(self.min_loss_scale, self.max_consecutive_skips),
            deliver=self._on_record,
            is_active=lambda: self.is_ours() and any(policy.reads_steps for policy in self._policies),
            wants_update=lambda step: any(policy.wants_update(step) for policy in self._policies),
            is_automatic=self._is_automatic,
            refuse=self._refuse_to_guard,
        )
        self.pipeline.gate = Contained(self.pipeline, self._on_error)
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
        if session is not None and (session.has_begun or policy in session._policies):
            session.close()  # left over from a fit that ended without teardown
            session = None
        if policy.reads_steps:
            refuse_strategy(trainer)
        if session is None:
            session = cls(trainer)
        session._add(policy)
        return session

    def leave(self, policy: Policy) -> None:
        """Take a policy out, and what was done for it alone; with the last one the Trainer is as it was before."""
        if policy not in self._policies:
            return
        self._policies.remove(policy)
        if not any(p.reads_steps or p.reads_batches for p in self._policies):
            self._stop_measuring()
            return
        self._set_reading()
        if self.retries is not None and self.retries.retrier is policy:
            self.retries.settle()
            self._make_retries()
        if self.pipeline.guard is not None and not any(p.guards for p in self._policies):
            self.pipeline.guard = None
        self._set_hold()

    def subscribe(self, listener: Callable[[BadStep], None]) -> None:
        """Have a listener shown every bad step whole, before any policy hears of it. In `setup`, once."""
        self._subscribers.append(listener)

    def between_steps(self, action: Callable[[], None]) -> None:
        """Run an action as soon as no optimizer step is under way, for example to restore an earlier state.

        It runs at the end of the batch, before any other callback's hook, and not inside an accumulation window. What
        the session knows of the steps before is dropped then: gradients, losses, copies of buffers and metrics.
        """
        self._between_steps.append(action)

    def reject_batch(self, rejected: Tensor, by: str) -> None:
        """The batch that has begun is not to be trained on: its window's update is discarded.

        Args:
            rejected: 1.0 if that is so; 0-dimensional, and the same on all ranks.
            by: Who says so, for the event.
        """
        self._rejected_by = by
        if self.pipeline.guard is not None:
            self.pipeline.guard.reject(rejected)

    def recent_batch(self, record: StepRecord) -> Any:
        """The batch that a record names, if it is still held; else None."""
        return next((batch for number, batch in self._recent if number == record.batch_number), None)

    def use_plugin(self, plugin: Any) -> None:
        """Train with another precision plugin from now on."""
        trainer = self.trainer
        hooked = self._hooks is not None
        self._unhook()
        trainer.strategy.precision_plugin = plugin
        if hooked:
            self._hook()
        self.pipeline.forget_precision()
        if self.pipeline.guard is not None:
            self.pipeline.guard.rescan()  # buffers may have changed their type

    def restore_contents(self) -> tuple[list[str], list[str]]:
        """Look at everything the module holds; restore what became non-finite. Waits for the device.

        Returns:
            The names of what has been restored, and of what could not be: there is no copy of it.
        """
        contents, guard = self._contents, self.pipeline.guard
        if contents is None or guard is None:
            return [], []
        bad = contents.became_nonfinite()
        restored = contents.restore(bad, guard.copy_of) if bad else []
        guard.keep(contents.written)
        return restored, [name for name in bad if name not in restored]

    def stopped(self, why: str) -> None:
        """A callback ends the run, for this reason."""
        self._lifecycle.stopped(why)

    def drain(self) -> None:
        """Wait for the records of all steps so far and hand them to the policies."""
        if self.pipeline.guard is not None:
            self.pipeline.guard.settle_all()
        self.pipeline.reads.drain()
        if self.retries is not None:
            self.retries.settle()

    @property
    def trainer(self) -> Any:
        """The Trainer."""
        trainer = self._trainer()
        assert trainer is not None, "a session does not outlive its Trainer"
        return trainer

    @property
    def guard(self) -> Guard | None:
        """Keeps bad updates from being made, if a policy asked for that."""
        return self.pipeline.guard

    @property
    def can_skip_a_batch(self) -> bool:
        """Whether a batch on which `training_step` has raised can be left out."""
        return self.trainer.world_size == 1 and bool(self.trainer.lightning_module.automatic_optimization)

    @property
    def is_measuring(self) -> bool:
        """Whether a policy needs records."""
        return self._hooks is not None

    def is_ours(self) -> bool:
        """Whether the run is training; the learning-rate and batch-size finders do it with other callbacks."""
        trainer = self._trainer()  # gone, if a scheduler has kept our stand-in in an optimizer that outlives it
        return trainer is not None and any(callback is self for callback in trainer.callbacks)

    # Lightning's hooks.

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """All callbacks are set up."""
        self.has_begun = True
        if any(policy.asked_for for policy in self._policies):
            self._lifecycle.prepare(trainer, self.events)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything is set up and restored: take the places in the step."""
        self._lifecycle.started(trainer, [callback for callback in trainer.callbacks if callback is not self])
        self._seconds_of_start = time.monotonic()
        self._contain(self._begin)

    def _begin(self) -> None:
        if self._hooks is None:
            return
        trainer, module = self.trainer, self.trainer.lightning_module
        for optimizer in trainer.optimizers:
            self.pipeline.watch(optimizer)
        self._unknown = UnknownOptimizers(module, self.pipeline.watch)
        if self._shall_guard():
            self.pipeline.guard = Guard(module, self._results, trainer.world_size > 1)
            self._contents = Contents(module, lambda: trainer.optimizers)
            self._contents.reference()
            if not all(policy.automatic for policy in self._policies if policy.guards):
                for optimizer in trainer.optimizers:
                    say_what_it_costs(trainer, optimizer)
        self._make_retries()
        self._set_hold()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Modules, buffers and metrics may be others."""
        if self.guard is not None:
            self.guard.rescan()
        if self.retries is not None and self.retries.windows is not None:
            self.retries.windows.rescan()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A batch is about to enter `training_step`."""
        if self.guard is not None:
            self._recent.append((internals.batch_number(trainer), batch))
            self._contain(self.guard.begin_batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """`training_step` and its optimizer steps are through, and no validation or save has come yet."""
        self.uncast = None
        if self.guard is not None:
            self._contain(self._end_batch)
        while self._between_steps and not internals.window_is_open(trainer):
            self.drain()
            self._between_steps.popleft()()
            self._forget_steps()
        self._write_progress(trainer, batch_idx)

    def _end_batch(self) -> None:
        assert self.guard is not None
        if self.retries is not None:
            self.retries.settle()
        self.guard.settle_batch()
        if internals.validation_is_due(self.trainer) or self.trainer.is_last_batch or self._between_steps:
            self.drain()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Read what is on its way, so that an epoch's numbers are there when it ends; its metrics are computed next."""
        self._contain(self.drain)
        if self.guard is not None:
            self._contain(self.guard.end_epoch)
            self._contain(self._check_contents, True)
        self._write_progress(trainer, internals.batch_index(trainer), always=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Read what is on its way, before the loggers are closed."""
        self._contain(self.drain)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """No checkpoint holds what a bad step has left in a metric."""
        if self.has_begun:
            self._contain(self.drain)
            self._contain(self._check_contents, trainer.world_size == 1)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Read what is on its way, which may say why: after an exception Lightning calls no teardown."""
        with contextlib.suppress(RuntimeError):  # a device that failed must not hide what made it fail
            self._contain(self.drain)
        self._end(exception)
        self._lifecycle.failed(trainer, exception)
        self._stop_measuring()
        self._remove_from(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The fit is over."""
        self._end(None)
        self._stop_measuring()
        if stage == "fit":
            self._lifecycle.ended(trainer)
        self._remove_from(trainer)

    def close(self) -> None:
        """Restore the Trainer as it was and drop what was not read."""
        self._stop_measuring()
        trainer = self._trainer()
        if trainer is not None:
            self._remove_from(trainer)

    def __reduce__(self) -> tuple[Any, ...]:
        # A list of callbacks that is pickled in the middle of a fit must load where this package is not.
        base = next(cls for cls in type(self).__mro__ if cls.__module__.endswith("callbacks.callback"))
        return base, ()

    # The step's hooks (`hooks.StepListener`).

    def on_input(self, batch: Any) -> None:
        """A batch is about to be cast to the precision's own type, where that casts."""
        dtype = internals.input_dtype(self.trainer.precision_plugin)
        if not (self.trainer.training or self.trainer.validating or self.trainer.sanity_checking) or dtype is None:
            return
        if dtype == torch.float16:
            self.uncast = batch
        if self.retries is not None and self.retries.windows is not None:
            self._uncast_for_retry = UncastBatch(batch, self.trainer.strategy.root_device)

    def on_loss(self, loss: Tensor) -> None:
        """A backward pass is about to run from this loss."""
        if not self.is_ours():
            return
        if self.guard is not None:
            self.guard.note_loss(loss)
        if any(policy.reads_steps for policy in self._policies):  # else no step would take it
            self.pipeline.on_loss(loss)

    def on_backward_end(self) -> None:
        """A backward pass is over: what the forward pass wrote stays, or is restored."""
        if self.guard is not None and self.is_ours():
            self.guard.after_backward()

    def on_gradients(self, optimizer: Optimizer) -> None:
        """They are final but for clipping."""
        self.pipeline.measure(optimizer)

    def on_own_clipping(self, optimizer: Any) -> None:
        """A module clips by itself."""
        self.pipeline.on_own_clipping(getattr(optimizer, "optimizer", optimizer))

    def on_clipped(self, optimizer: Optimizer) -> None:
        """Clipping is over."""
        self.pipeline.on_clipped(optimizer)

    def clips(self, optimizer: Optimizer, max_norm: float) -> bool:
        """Clip with the norm that was measured; False if it cannot be used."""
        return self.pipeline.clips(optimizer, max_norm)

    def on_step_begin(self, optimizer: Optimizer) -> None:
        """A step begins."""
        if self.pipeline.read_lag and self.retries is not None and self.retries.windows is not None:
            self.retries.windows.note_scaler(self.trainer.precision_plugin)
        self.pipeline.on_step_begin(optimizer)

    def on_step_end(self) -> None:
        """A step is over; a forward pass without a backward pass is judged before any `on_train_batch_end`."""
        self.pipeline.on_step_end()
        if self.guard is not None and self.is_ours():
            self.guard.settle_batch()

    def after_step(self, optimizer: Optimizer, model: Any, result: Any, kwargs: dict[str, Any]) -> Any:
        """The plugin's `optimizer_step` is through: the place to train a bad step's batches again."""
        if self.retries is None or not self.is_ours():
            return result
        return self.retries.after_step(optimizer, model, result, kwargs)

    def training_step(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call it; an exception that a non-finite batch has caused may be answered by skipping the batch."""
        try:
            return original(*args, **kwargs)
        except Exception as error:
            if self.guard is None or not self.is_ours() or not self._skips_exception(error, args, kwargs):
                raise
            loss = torch.full((), math.nan, device=self.trainer.strategy.root_device)
            self.guard.fail_batch(loss.device)
            self.pipeline.add_loss(loss)
            self.pipeline.losses.exception = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            return None

    # Records.

    def _on_record(self, record: StepRecord) -> None:
        if self.retries is None:
            self._deliver(record)
        else:
            self.retries.add(record)

    def _deliver(self, record: StepRecord) -> None:
        """Count a step, write its event, and show it to the policies in their order."""
        self._last = record
        many = self.counts.add(record)
        if record.outcome == Outcome.BAD:
            answer = self._contain(self.restore_contents)
            record.restored, record.not_restored = answer or ([], [])
        if self.trainer.is_global_zero:
            if record.outcome in _SKIPS and self._is_told(record):
                self._write_skip(record)
            if many:
                self.events.write("many_skips", record.step, record.epoch, skipped=many, of=self.counts.RECENT)
        for policy in sorted(self._policies, key=lambda policy: policy.order):
            if policy in self._policies:  # an earlier one may have taken it out
                self._contain(policy.on_record, record, policy=policy)
        if many and (first := next((p for p in self._policies if p.guards), None)) is not None:
            self._contain(first.on_many_skips, many, self.counts.RECENT, policy=first)

    def _is_told(self, record: StepRecord) -> bool:
        # every run in 16-mixed begins with ordinary skips: where nobody asked, they are no reason for a file
        return record.outcome != Outcome.ORDINARY_SKIP or any(policy.asked_for for policy in self._policies)

    def _write_skip(self, record: StepRecord) -> None:
        details: dict[str, Any] = {}
        for policy in self._policies:
            details = details or self._contain(policy.describe_skip, record, policy=policy) or {}
        self.events.write(
            "update_skipped",
            record.step,
            record.epoch,
            by=self._rejected_by if record.outcome == Outcome.REJECTED else record.skipped_by,
            ordinary=record.outcome == Outcome.ORDINARY_SKIP,
            **details,
            batch_idx=record.batch_idx,
            batches=record.batches,
            loss=record.loss,
            loss_scale=record.loss_scale,
        )

    def _write_progress(self, trainer: Any, batch_idx: int, always: bool = False) -> None:
        now = time.monotonic()
        if not trainer.is_global_zero or not (always or now - self._progress_at >= _PROGRESS_SECONDS):
            return
        if self.events.path is None or not any(policy.asked_for for policy in self._policies):
            return
        self._progress_at, record, batches = now, self._last, trainer.num_training_batches
        self.events.write(
            "progress",
            trainer.global_step,
            trainer.current_epoch,
            batch_idx=batch_idx,
            batches=int(batches) if math.isfinite(batches) else None,
            loss=None if record is None else record.loss,
            grad_norm=None if record is None else record.total_norm,
            loss_scale=None if record is None else record.loss_scale,
            learning_rate=None if record is None or not record.learning_rates else record.learning_rates[0],
            skipped=self.counts.skipped,
            seconds=round(now - self._seconds_of_start, 3),
        )

    # Parts of the above.

    def _end(self, exception: BaseException | None) -> None:
        for policy in list(self._policies):
            self._contain(policy.on_session_end, exception, policy=policy)

    def _add(self, policy: Policy) -> None:
        self._policies.append(policy)
        if policy.automatic:
            contain_hooks(policy, lambda error: self._on_error(error, policy))
        if (policy.reads_steps or policy.reads_batches) and self._hooks is None:
            self._hook()
        self._set_reading()

    def _hook(self) -> None:
        strategy = self.trainer.strategy
        self._hooks = PluginHooks(strategy.precision_plugin, strategy, _Listener(self, self._on_error))

    def _unhook(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def _check_contents(self, all_ranks: bool) -> None:
        """Where nothing was bad, something may have been written that no step's judgement sees.

        Args:
            all_ranks: Whether all ranks are here now, so that they can act alike.
        """
        restored, lost = self.restore_contents()
        if all_ranks and self.trainer.strategy.reduce_boolean_decision(bool(lost), all=False):
            lost = lost or ["a parameter or buffer of another rank"]
        if self._contents is not None:
            self._contents.reference()
        if restored or lost:
            if self.trainer.is_global_zero:
                step, epoch = self.trainer.global_step, self.trainer.current_epoch
                self.events.write("contents_nonfinite", step, epoch, restored=restored, not_restored=lost)
            for policy in [p for p in self._policies if p.guards]:
                self._contain(policy.on_nonfinite_contents, restored, lost, all_ranks, policy=policy)

    def _set_reading(self) -> None:
        self.pipeline.reads.every = min((p.read_every for p in self._policies if p.reads_steps), default=1)

    def _results(self) -> Any:
        return internals.logged_results(self.trainer)

    def _shall_guard(self) -> bool:
        """Whether a policy wants updates guarded. If they cannot be, automatic policies leave; others refuse."""
        guarding = [policy for policy in self._policies if policy.guards]
        try:
            for optimizer in self.trainer.optimizers if guarding else ():
                refuse_optimizer(optimizer)
        except MisconfigurationException as refusal:
            self._refuse_to_guard(refusal)
            return False
        return bool(guarding)

    def _refuse_to_guard(self, refusal: MisconfigurationException) -> None:
        guarding = [policy for policy in self._policies if policy.guards]
        if not all(policy.automatic for policy in guarding):
            raise refusal
        for policy in guarding:
            policy.disable(self.trainer, refusal)

    def _make_retries(self) -> None:
        """Keep the batches of the open window where somebody may need them again."""
        trainer, guard = self.trainer, self.pipeline.guard
        self._overrides.restore()
        self.retries = None
        candidates = [policy for policy in self._policies if hasattr(policy, "wants_retry")]
        retrier: Any = next((policy for policy in candidates if policy.wants_retry()), None)  # type: ignore[attr-defined]
        self.pipeline.read_lag = None
        if guard is None or (retrier is None and not self._subscribers):
            return
        module, device = trainer.lightning_module, trainer.strategy.root_device
        lag = self._lag()
        windows = None
        if module.automatic_optimization:
            windows = Windows(module, self._results, device, lag + 1)
            internals.on_closure(self._overrides, trainer, self._on_closure)
        self.pipeline.read_lag = lag
        self.retries = Retries(
            trainer,
            retrier,
            guard,
            windows,
            MetricUndo(module, self._results),
            step=self._try_step,
            drain=self.pipeline.reads.drain,
            forget_losses=self.pipeline.forget_losses,
            deliver=self._deliver,
            show=self._show,
            is_ending=lambda: self.ending,
        )

    def _lag(self) -> int:
        """How many steps the host may be behind: where the device decides alone, it need not wait for it."""
        trainer = self.trainer
        on_device = trainer.strategy.root_device.type != "cpu" and trainer.world_size == 1
        return int(on_device and all(decides_on_device(optimizer) for optimizer in trainer.optimizers))

    def _set_hold(self) -> None:
        """After how many bad updates in a row the device holds those that follow, until the host has answered."""
        guard = self.pipeline.guard
        if guard is None:
            return
        if self.retries is None or self.retries.retrier is None:
            guard.patience = min((policy.patience for policy in self._policies), default=math.inf)
        else:  # a step that is going to be trained again: at once, or after the one that is under way
            guard.patience = 0 if self.pipeline.read_lag else math.inf

    def _try_step(self, optimizer: Optimizer, model: Any, closure: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        assert self._hooks is not None
        return self._hooks.step(optimizer, model, closure, kwargs)

    def _on_closure(self, closure: Any, kwargs: dict[str, Any]) -> None:
        if self.is_ours() and self.retries is not None and self.retries.windows is not None:
            self.retries.windows.open.add(closure, kwargs, self._uncast_for_retry)
            self._uncast_for_retry = None

    def _show(self, bad_step: BadStep) -> None:
        for listener in self._subscribers:
            self._contain(listener, bad_step)

    def _skips_exception(self, error: Exception, args: Any, kwargs: Any) -> bool:
        batch = args[0] if args else next(iter(kwargs.values()), None)
        answers = [bool(self._contain(p.skips_exception, error, batch, policy=p)) for p in list(self._policies)]
        return self.can_skip_a_batch and any(answers)

    def _forget_steps(self) -> None:
        self.pipeline.forget_losses()
        if self.guard is not None:
            self.guard.release()
            self.guard.forget_batch()
            self.guard.rescan()

    def _stop_measuring(self) -> None:
        self._overrides.restore()
        self.retries = None
        self.pipeline.remove()
        self._unhook()
        if self._unknown is not None:
            self._unknown.remove()
            self._unknown = None

    def _remove_from(self, trainer: Any) -> None:
        for policy in self._policies:
            policy.session = None
        self._policies.clear()
        others = [callback for callback in trainer.callbacks if callback is not self]
        # the user's own list object again, if nothing else has changed
        same = len(others) == len(self._user_callbacks) and all(map(_is, others, self._user_callbacks))
        trainer.callbacks = self._user_callbacks if same else others

    # Errors.

    def _is_automatic(self) -> bool:
        return all(policy.automatic for policy in self._policies)

    def _contain(self, action: Callable[..., Any], *args: Any, policy: Policy | None = None) -> Any:
        try:
            return action(*args)
        except Exception as error:
            if isinstance(error, (DeliberateError, StopIteration)) or not self._on_error(error, policy):
                raise
            return None

    def _on_error(self, error: Exception, policy: Policy | None = None) -> bool:
        """An error of ours: automatic policies disable themselves. Returns whether the run can continue."""
        failing = list(self._policies) if policy is None else [policy]
        if not failing or not all(policy.automatic for policy in failing):
            return False
        for policy in failing:
            policy.disable(self.trainer, repr(error))
        return True


class _Listener(Contained):
    """The session, for its hooks."""

    def after_step(self, optimizer: Any, model: Any, result: Any, kwargs: dict[str, Any]) -> Any:
        """A failure of ours leaves the step's result as it is."""
        return self._target._contain(self._target.after_step, optimizer, model, result, kwargs) or result

    def training_step(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The user's own exceptions are not ours to contain."""
        return self._target.training_step(original, args, kwargs)


def session_of(trainer: Any) -> Session | None:
    """The Trainer's session, while a fit goes on with one of our callbacks."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Session)), None)


def _is(a: Any, b: Any) -> bool:
    return a is b
