"""Training a bad step's batches once more, before any other policy hears of it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from lightning_stability.health import StepRecord
from lightning_stability.internals import set_scaler_state, transferred, zero_without_hooks
from lightning_stability.recovery import BufferUndo, Guard, MetricUndo
from lightning_stability.runtime.manual_windows import ManualWindows
from lightning_stability.runtime.record import Outcome
from lightning_stability.runtime.windows import BadStep, Windows, options_of, set_options


class Retrier(Protocol):
    """A policy that may have a bad step's batches trained again, before any other policy hears of it."""

    def wants_retry(self) -> bool:
        """Whether it could do anything about a bad step now."""

    def before_retry(self) -> None:
        """Change what has to be changed; the batches are trained again next."""

    def after_retry(self, failed: StepRecord, again: StepRecord) -> StepRecord:
        """Keep the change or take it back; returns the record that the other policies get."""

    def cannot_retry(self, record: StepRecord, why: str) -> None:
        """The batches cannot be trained again."""

    def no_memory_for_retry(self, record: StepRecord) -> Exception:
        """What to raise when the device has no room for it."""


class Retries:
    """Shows a bad step whole to whoever subscribed, and has its batches trained again when the retrier asks for it.

    The verdict on a step may come one step late, so that the host need not wait for the device. The device has then
    held the update that followed: the bad step's batches are trained again first, then those of the held step.

    Args:
        retrier: Decides; None if nothing is ever trained again.
        windows: Keeps the batches; None in manual optimization.
        manual: Keeps them there.
        metrics: To keep and restore what a try has left in metrics.
        step: Runs one optimizer step: `(optimizer, model, closure, kwargs)`.
        drain: Waits for the records of all steps so far; they come through `add`.
        forget_losses: Called before batches are run again.
        deliver: Shows a record to the other policies.
        show: Shows a bad step whole: as it failed first (True), before its batches are trained again, and as it ended.
        keeps_state: Whether an update that follows a bad one is held, so that the state from before it can be shown.
        is_ending: Whether the run is about to end.
    """

    def __init__(
        self,
        trainer: Any,
        retrier: Retrier | None,
        guard: Guard,
        windows: Windows | None,
        manual: ManualWindows | None,
        metrics: MetricUndo,
        step: Callable[[Optimizer, Any, Callable[[], Any], dict[str, Any]], Any],
        drain: Callable[[], None],
        forget_losses: Callable[[], None],
        deliver: Callable[[StepRecord], None],
        show: Callable[[BadStep, bool], None],
        keeps_state: bool,
        is_ending: Callable[[], bool],
    ) -> None:
        self.retrier = retrier
        self.windows = windows
        self.manual = manual
        self._trainer = trainer
        self._guard = guard
        self._metrics = metrics
        self._step = step
        self._drain = drain
        self._forget_losses = forget_losses
        self._deliver = deliver
        self._show = show
        self.holds = retrier is not None or keeps_state
        """Whether updates that follow a bad one wait for the host's answer."""
        self._is_ending = is_ending
        self._arrived: deque[StepRecord] = deque()
        self._newest: tuple[Optimizer, Any, dict[str, Any]] | None = None

    def rescan(self) -> None:
        """An epoch begins."""
        for windows in (self.windows, self.manual):
            if windows is not None:
                windows.rescan()

    def add(self, record: StepRecord) -> None:
        """A step's record is complete; nobody hears of it before it is settled."""
        self._arrived.append(record)

    def after_step(self, optimizer: Optimizer, model: Any, result: Any, kwargs: dict[str, Any]) -> Any:
        """The plugin's `optimizer_step` has returned. Settle what has arrived; returns the step's result, maybe new."""
        self._newest = optimizer, model, kwargs
        if self.windows is not None:
            self.windows.close(optimizer)
        return self.settle(result)

    def settle(self, result: Any = None) -> Any:
        """Hand over what has arrived, and train again what was bad. Called between two steps."""
        while self._arrived:
            record = self._arrived.popleft()
            if record.outcome == Outcome.BAD:
                self._drain()
                result = self._answer(record, result)
            else:
                if record.outcome == Outcome.REJECTED:
                    self._show(self._bad_step(record), True)
                self._finish(record)
        return result

    def _answer(self, failed: StepRecord, result: Any) -> Any:
        """What becomes of a bad step, and of those that were held for its sake."""
        held = [record for record in self._arrived if record.outcome == Outcome.HELD]
        plugin = self._trainer.precision_plugin
        said = failed
        self._show(self._bad_step(failed), True)
        if self.retrier is not None and self.retrier.wants_retry():
            why = self._objection()
            if why is None:
                self._arrived.clear()
                said, result = self._retry(self.retrier, failed, result)
            else:
                self.retrier.cannot_retry(failed, why)
        self._finish(said)
        if not self.holds or self._is_ending():
            return result
        self._guard.release()
        if held:
            self._arrived.clear()
        for record in held:
            if self.windows is not None and self._trainer.precision_plugin is plugin:
                set_scaler_state(plugin, self.windows.closed[0].scaler)
            again, result = self._train(record)
            self._arrived.append(again)
        return result

    def _objection(self) -> str | None:
        """Why the batches cannot be trained again. On all ranks, or on none."""
        if self.windows is None or self._newest is None:
            return "manual optimization does not say which batches an update comes from"
        if any(later.outcome != Outcome.HELD for later in self._arrived):
            return "another update was made before it was known"
        changed = any(window.changed_in_place() for window in self.windows.closed)
        # (one rank may have changed its batch where the others have not)
        if self._trainer.strategy.reduce_boolean_decision(changed, all=False):
            return "`training_step` changes its batch in place"
        return None

    def _retry(self, retrier: Retrier, failed: StepRecord, result: Any) -> tuple[StepRecord, Any]:
        assert self.windows is not None
        guard = self._guard
        guard.settle_batch()
        # what the failed try has left, should the next one not help
        tried, tried_metrics = BufferUndo(self._trainer.lightning_module), self._metrics.snapshot()
        tried.remember()
        retrier.before_retry()
        guard.release()
        guard.forget_batch()
        self.windows.closed[0].restore()
        try:
            again, result = self._train(failed)
        except torch.cuda.OutOfMemoryError as error:
            raise retrier.no_memory_for_retry(failed) from error
        said = retrier.after_retry(failed, again)
        if again.outcome != Outcome.APPLIED:  # it is as if there had been the first try alone
            tried.restore(torch.tensor(True))
            self._metrics.restore_snapshot(tried_metrics)
            guard.note_metrics()
        return said, result

    def _train(self, before: StepRecord) -> tuple[StepRecord, Any]:
        """Train the oldest window's batches; returns the new record, under the old step's number, and the result."""
        assert self.windows is not None
        assert self._newest is not None
        optimizer, model, kwargs = self._newest
        trainer, guard, window, result = self._trainer, self._guard, self.windows.closed[0], None
        guard.forget_batch()
        self._forget_losses()
        options = options_of(optimizer)
        set_options(optimizer, window.options)

        def zero_grad() -> None:
            model.optimizer_zero_grad(trainer.current_epoch, before.batch_idx, optimizer)

        for number, closure in enumerate(window.again(lambda batch: transferred(trainer, batch)), start=1):
            guard.begin_batch()
            zero_without_hooks(closure, zero_grad)
            if number < len(window.batches):
                with getattr(trainer.strategy, "block_backward_sync", contextlib.nullcontext)():
                    closure()
            else:
                result = self._step(optimizer, model, closure, kwargs)
        self._drain()
        set_options(optimizer, options)
        again = self._arrived.pop()
        self._arrived.clear()
        again.step, again.logger_step, again.epoch = before.step, before.logger_step, before.epoch
        again.batch_idx, again.batch_number = before.batch_idx, before.batch_number
        return again, result

    def _finish(self, record: StepRecord) -> None:
        """The step's verdict is final."""
        if record.outcome == Outcome.BAD:
            self._show(self._bad_step(record), False)
        if self.windows is not None and self.windows.closed:
            self.windows.release()
        if self.manual is not None:
            self.manual.note(record)
        self._deliver(record)

    def _bad_step(self, record: StepRecord) -> BadStep:
        is_late = any(later.outcome == Outcome.APPLIED for later in self._arrived)
        if self.manual is not None:
            # (none where the module keeps its optimizers to itself)
            optimizer = next(iter(self._trainer.optimizers[record.optimizer :]), None)
            return BadStep(record, self.manual.of(record), optimizer, self._trainer, is_late)
        window = self.windows.closed[0] if self.windows is not None and self.windows.closed else None
        return BadStep(record, window, None if self._newest is None else self._newest[0], self._trainer, is_late)
