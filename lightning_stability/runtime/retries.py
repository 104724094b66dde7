"""Training a bad step's batches once more, before any other policy hears of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.optim import Optimizer

from lightning_stability.health import StepRecord
from lightning_stability.recovery import Guard, OpenWindow
from lightning_stability.recovery.retry import UncastBatch
from lightning_stability.runtime.taps import ClosureTap, zero_quietly

if TYPE_CHECKING:
    from lightning_stability.runtime.runtime import Runtime


class Retrier(Protocol):
    """A policy that may have a bad step's batches trained again, before any other policy hears of it."""

    def wants_retry(self) -> bool:
        """Whether it could do anything about a bad step now; if so, each step is read at once."""

    def before_retry(self) -> None:
        """Change what has to be changed; the batches are trained again next."""

    def after_retry(self, failed: StepRecord, again: StepRecord) -> StepRecord:
        """Keep the change or take it back; returns the record that the other policies get."""

    def cannot_retry(self, record: StepRecord, why: str) -> None:
        """The batches cannot be trained again."""

    def no_memory_for_retry(self, record: StepRecord) -> Exception:
        """What to raise when the device has no room for it."""


class Retries:
    """Keeps the batches of the open accumulation window, and has them trained again when the retrier asks for it.

    Args:
        runtime: Whose steps are meant.
        retrier: Decides.
        guard: Judges the steps.
        module: The LightningModule.
    """

    def __init__(self, runtime: Runtime, retrier: Retrier, guard: Guard, module: Any) -> None:
        self._runtime = runtime
        self.retrier = retrier
        self._guard = guard
        self._window: OpenWindow | None = None
        self._closures: ClosureTap | None = None
        self._uncast: UncastBatch | None = None
        self._arrived: list[StepRecord] = []
        trainer = runtime.trainer
        if module.automatic_optimization:
            self._window = OpenWindow(module, runtime.results, trainer.strategy.root_device)
            self._closures = ClosureTap(trainer.fit_loop.epoch_loop.automatic_optimization, self)

    def remove(self) -> None:
        """Batches are not kept any more."""
        if self._closures is not None:
            self._closures.remove()
        self._window = self._closures = None

    def rescan(self) -> None:
        """An epoch begins: modules, buffers and metrics may be others."""
        if self._window is not None:
            self._window.rescan()

    def note_input(self, batch: Any) -> None:
        """A batch is about to be cast to the precision's own type, where that casts.

        Args:
            batch: As the loader gave it.
        """
        strategy = self._runtime.trainer.strategy
        if self._window is not None and hasattr(strategy.precision_plugin, "_desired_input_dtype"):
            self._uncast = UncastBatch(batch, strategy.root_device)

    def note_closure(self, closure: Callable[[], Any], kwargs: dict[str, Any]) -> None:
        """A batch is about to be trained.

        Args:
            closure: Runs its forward and backward pass.
            kwargs: What `training_step` will be called with.
        """
        if self._window is not None and self._runtime.is_ours():
            self._window.add(closure, kwargs, self._uncast)
            self._uncast = None

    def note_record(self, record: StepRecord) -> None:
        """A step's numbers are there; `after_step` may have it trained again before anybody hears of it.

        Args:
            record: Of the step.
        """
        self._arrived.append(record)

    def take_arrived(self) -> list[StepRecord]:
        """The records of steps that Lightning did not know of."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def after_step(self, optimizer: Optimizer, model: Any, result: Any, kwargs: dict[str, Any]) -> Any:
        """The plugin's `optimizer_step` has returned; if the step was bad, the retrier may have it done again.

        Args:
            optimizer: The bare torch optimizer.
            model: The LightningModule.
            result: What the plugin returned.
            kwargs: What else it was called with.
        """
        arrived = self.take_arrived()
        if arrived and arrived[-1].outcome == "bad" and self.retrier.wants_retry():
            failed = arrived.pop()
            self._runtime.tell(*arrived)
            result = self._retry(failed, optimizer, model, result, kwargs)
        else:
            self._runtime.tell(*arrived)
        if self._window is not None:
            self._window.close()
        return result

    def _retry(self, failed: StepRecord, optimizer: Optimizer, model: Any, result: Any, kwargs: Any) -> Any:
        retrier, runtime, window = self.retrier, self._runtime, self._window
        strategy = runtime.trainer.strategy
        # (one rank may have changed its batch where the others have not: all of them train again, or none)
        if window is None or strategy.reduce_boolean_decision(window.changed_in_place(), all=False):
            why = "manual optimization does not say which batches an update comes from"
            retrier.cannot_retry(failed, why if window is None else "`training_step` changes its batch in place")
            runtime.tell(failed)
            return result
        self._guard.settle_batch()
        window.remember_try()
        retrier.before_retry()
        self._guard.forget_batch()
        window.restore()
        runtime.steps.forget_window()

        def zero_grad() -> None:
            model.optimizer_zero_grad(runtime.trainer.current_epoch, failed.batch_idx, optimizer)

        try:
            for number, closure in enumerate(window.again(self._converted), start=1):
                self._guard.begin_batch()
                zero_quietly(closure, zero_grad)
                if number < window.batches:
                    with getattr(strategy, "block_backward_sync", contextlib.nullcontext)():
                        closure()
                else:
                    result = runtime.try_step(optimizer, model, closure, kwargs)
        except torch.cuda.OutOfMemoryError as error:
            raise retrier.no_memory_for_retry(failed) from error
        again = self._arrived.pop()
        self._arrived.clear()
        said = retrier.after_retry(failed, again)
        if again.outcome != "taken":  # it is as if there had been the first try alone
            window.restore_try()
            self._guard.note_metrics()
        runtime.tell(said)
        return result

    def _converted(self, batch: Any) -> Any:
        """A batch for the precision of now, as Lightning makes it."""
        trainer = self._runtime.trainer
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
