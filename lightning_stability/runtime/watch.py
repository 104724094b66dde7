"""The session's part inside a step: it hears of batches, losses, gradients and steps, and guards them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stability import internals
from lightning_stability.health import StepRecord
from lightning_stability.internals import Overrides
from lightning_stability.recovery import Guard, MetricUndo
from lightning_stability.recovery.content import Contents
from lightning_stability.runtime.containment import Contained, ContainedListener
from lightning_stability.runtime.dispatch import Dispatch
from lightning_stability.runtime.hooks import PluginHooks
from lightning_stability.runtime.manual_windows import ManualWindows
from lightning_stability.runtime.optimizers import UnknownOptimizers
from lightning_stability.runtime.pipeline import Pipeline
from lightning_stability.runtime.record import Limits, Outcome
from lightning_stability.runtime.retry import Retries
from lightning_stability.runtime.trainers import read_lag, say_what_it_costs
from lightning_stability.runtime.windows import BadStep, UncastBatch, Windows


class Watch:
    """Measures and guards the steps of one Trainer while its own callbacks train it (`hooks.StepListener`).

    Args:
        limits: What separates an ordinary skip from a bad step.
        is_ours: Whether the run is training; the learning-rate and batch-size finders do it with other callbacks.
    """

    def __init__(
        self, trainer: Callable[[], Any], dispatch: Dispatch, limits: Limits, is_ours: Callable[[], bool]
    ) -> None:
        self._trainer_of = trainer
        self._dispatch = dispatch
        self._is_ours = is_ours
        self._overrides = Overrides()
        self._recent: deque[tuple[int, Any]] = deque(maxlen=2)
        self._uncast_for_retry: UncastBatch | None = None
        self._contents: Contents | None = None
        self._hooks: PluginHooks | None = None
        self._unknown: UnknownOptimizers | None = None
        self._skipped_backward, self._look_in = False, 2  # batches, until all that the module holds is looked at
        self._explained = 0  # the id of an exception on its way from the backward pass through `training_step`
        self.ending = False
        """Set by a policy that ends the run: a held update stays held."""
        self.subscribers: list[tuple[Callable[[BadStep], None], bool]] = []
        """Those who are shown bad steps whole, and whether they need the state from before each."""
        self.most_batches = 0.0
        """Batches of a window above which no subscriber needs it whole."""
        self.uncast: Any = None
        self.retries: Retries | None = None
        self.pipeline = Pipeline(
            self._trainer,
            limits,
            deliver=self._on_record,
            is_active=lambda: is_ours() and dispatch.read_steps,
            wants_update=dispatch.wants_update,
            is_automatic=dispatch.is_automatic,
            refuse=dispatch.refuse_to_guard,
        )
        self.pipeline.gate = Contained(self.pipeline, dispatch.on_error)

    @property
    def _trainer(self) -> Any:
        return self._trainer_of()

    def results(self) -> Any:
        """What `self.log` accumulates in the training epoch."""
        return internals.logged_results(self._trainer)

    @property
    def guard(self) -> Guard | None:
        """Keeps bad updates from being made, if a policy asked for that."""
        return self.pipeline.guard

    @property
    def is_hooked(self) -> bool:
        """Whether it hears of steps."""
        return self._hooks is not None

    # The fit.

    def hook(self) -> None:
        """Hear of steps from now on."""
        strategy = self._trainer.strategy
        self._hooks = PluginHooks(strategy.precision_plugin, strategy, ContainedListener(self, self._dispatch.on_error))

    def use_plugin(self, plugin: Any) -> None:
        """Train with another precision plugin from now on."""
        was_hooked = self.is_hooked
        self._unhook()
        self._trainer.strategy.precision_plugin = plugin
        if was_hooked:
            self.hook()
        self.pipeline.forget_precision()
        if self.guard is not None:
            self.guard.rescan()  # buffers may have changed their type

    def start(self) -> None:
        """Everything is set up and restored: take the places in the step."""
        trainer, module = self._trainer, self._trainer.lightning_module
        for optimizer in trainer.optimizers:
            self.pipeline.watch(optimizer)
        self._unknown = UnknownOptimizers(module, self.pipeline.watch, self.pipeline.forget, self.pipeline.gate)
        if self._dispatch.may_guard(trainer.optimizers):
            self.pipeline.guard = Guard(module, self.results, trainer.world_size > 1)
            self._contents = Contents(module, lambda: trainer.optimizers)
            self._contents.reference()
            if not all(policy.automatic for policy in self._dispatch.those_that_guard()):
                for optimizer in trainer.optimizers:
                    say_what_it_costs(trainer, optimizer)
        self.arrange()

    def arrange(self) -> None:
        """The policies are others: read, guard, keep batches and hold updates as they need it."""
        self.pipeline.reads.every = self._dispatch.read_every
        if self.guard is not None and not self._dispatch.those_that_guard():
            self.pipeline.guard = None
        if self.retries is not None:
            self.retries.settle()
        self._make_retries()
        self._set_hold()

    def stop(self) -> None:
        """Restore the Trainer as it was, and drop what was not read."""
        self._overrides.restore()
        self.retries = None
        self.pipeline.remove()
        self._unhook()
        if self._unknown is not None:
            self._unknown.remove()
            self._unknown = None

    def drain(self) -> None:
        """Wait for the records of all steps so far and hand them to the policies."""
        if self.guard is not None:
            self.guard.settle_all()
        self.pipeline.reads.drain()
        if self.retries is not None:
            self.retries.settle()

    def forget_steps(self) -> None:
        """An earlier state has been restored: what is known of the steps since does not count."""
        self.pipeline.forget_losses()
        if self.guard is not None:
            self.guard.release()
            self.guard.forget_batch()
            self.guard.rescan()

    # Epochs and batches.

    def begin_epoch(self) -> None:
        """Modules, buffers and metrics may be others."""
        if self.guard is not None:
            self.guard.rescan()
        if self.retries is not None:
            self.retries.rescan()

    def begin_batch(self, batch: Any) -> None:
        """A batch is about to enter `training_step`."""
        if self.guard is not None:
            self._explained, self._skipped_backward = 0, False
            if self._look_in == 0:  # after a bad step, whose numbers a hook may have written; once in the beginning
                self._dispatch.contain(self.check_contents, self._trainer.world_size == 1)
            self._look_in -= 1
            self._recent.append((internals.batch_number(self._trainer), batch))
            self.guard.begin_batch()

    def end_batch(self, drains: bool) -> None:
        """`training_step` and its optimizer steps are through, and no validation or save has come yet."""
        self.uncast = None
        if self.guard is None:
            return
        self.pipeline.end_batch()
        if self.retries is not None:
            self.retries.settle()
        self.guard.settle_batch()
        if drains or internals.validation_is_due(self._trainer) or self._trainer.is_last_batch:
            self.drain()

    def end_epoch(self) -> None:
        """Its metrics are computed next."""
        self.drain()
        if self.guard is not None:
            self.guard.end_epoch()

    def recent_batch(self, record: StepRecord) -> Any:
        """The batch that a record names, if it is still held; else None."""
        return next((batch for number, batch in self._recent if number == record.batch_number), None)

    def restore_contents(self) -> tuple[list[str], list[str]]:
        """Restore what became non-finite: names of what was restored, and what could not be. Waits for the device."""
        if self._contents is None or self.guard is None:
            return [], []
        return self._contents.mend(self.guard.copy_of)

    def check_contents(self, all_ranks: bool) -> None:
        """Where no step was bad, something may have been written that no step's judgement sees.

        Args:
            all_ranks: Whether all ranks are here now, so that they can act alike.
        """
        if self._contents is None or self.guard is None:
            return
        restored, lost = self._contents.mend(self.guard.copy_of, refer=True)
        if all_ranks and self._trainer.strategy.reduce_boolean_decision(bool(lost), all=False):
            lost = lost or ["a parameter or buffer of another rank"]
        self.guard.keep(self._contents.written)
        if restored or lost:
            self._dispatch.nonfinite_contents(restored, lost, all_ranks)

    # One step (`hooks.StepListener`).

    def on_input(self, batch: Any) -> None:
        """A batch is about to be cast to the precision's own type, where that casts."""
        trainer = self._trainer
        dtype = internals.input_dtype(trainer.precision_plugin)
        if dtype is None or not (trainer.training or trainer.validating or trainer.sanity_checking):
            return
        if dtype == torch.float16:
            self.uncast = batch
        if self.retries is not None and self.retries.windows is not None:
            self._uncast_for_retry = UncastBatch(batch, trainer.strategy.root_device)

    def on_loss(self, loss: Tensor) -> None:
        """A backward pass is about to run from this loss."""
        if not self._is_ours():
            return
        counted = self.pipeline.on_loss(loss) if self._dispatch.read_steps else None  # (else no step would take it)
        if self.guard is not None:
            self.guard.note_loss(loss, counted)

    def on_backward_end(self) -> None:
        """A backward pass is over: what the forward pass wrote stays, or is restored."""
        if self.guard is not None and self._is_ours():
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
            self.retries.windows.note_scaler(self._trainer.precision_plugin)
        self.pipeline.on_step_begin(optimizer)

    def on_step_end(self) -> None:
        """A step is over; a forward pass without a backward pass is judged before any `on_train_batch_end`."""
        self.pipeline.on_step_end()
        if self.guard is not None and self._is_ours():
            self.guard.settle_batch()

    def after_step(self, optimizer: Optimizer, model: Any, result: Any, kwargs: dict[str, Any]) -> Any:
        """The plugin's `optimizer_step` is through: the place to train a bad step's batches again."""
        if self.retries is None or not self._is_ours():
            return result
        return self.retries.after_step(optimizer, model, result, kwargs)

    def training_step(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call it; an exception that a non-finite batch has caused may be answered by skipping the batch."""
        batch = args[0] if args else next(iter(kwargs.values()), None)
        if self.retries is not None and self.retries.manual is not None and self._is_ours():
            self.retries.manual.add(internals.batch_number(self._trainer), args, not self.pipeline.losses.batches)
        return self._call(original, args, kwargs, "`training_step`", batch)

    def backward(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The same for the backward pass: of a non-finite loss some modules make one without a graph."""
        self._call(original, args, kwargs, "the backward pass", self._recent[-1][1] if self._recent else None)

    def backward_was_skipped(self) -> bool:
        """Whether the batch's backward pass has raised and was skipped."""
        return self._skipped_backward

    # Parts of the above.

    @property
    def can_skip_a_batch(self) -> bool:
        """Whether a batch on which `training_step` has raised can be left out."""
        automatic = bool(self._trainer.lightning_module.automatic_optimization)
        # (who detects anomalies wants their exceptions)
        return self._trainer.world_size == 1 and automatic and not torch.is_anomaly_enabled()

    def _call(self, original: Callable[..., Any], args: Any, kwargs: Any, what: str, batch: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except Exception as error:
            known, self._explained = id(error) == self._explained, id(error)
            if known or self.guard is None or not self._is_ours():
                raise
            if not self._dispatch.skips_exception(error, batch) or not self.can_skip_a_batch:
                raise
            device = self._trainer.strategy.root_device
            self.guard.fail_batch(device)
            self.pipeline.add_loss(torch.full((), math.nan, device=device))
            self.pipeline.losses.note_exception(what, error)
            self._skipped_backward = what != "`training_step`"
            return None

    def _on_record(self, record: StepRecord) -> None:
        (self._deliver if self.retries is None else self.retries.add)(record)

    def _deliver(self, record: StepRecord) -> None:
        if record.outcome == Outcome.BAD:
            answer = self._dispatch.contain(self.restore_contents)
            record.restored, record.not_restored = answer or ([], [])
            self._look_in = 0
        self._dispatch.deliver(record)

    def _unhook(self) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.remove()

    def _make_retries(self) -> None:
        """Keep the batches of the open window where somebody may need them again."""
        trainer, guard = self._trainer, self.guard
        # (one that is open goes on: its batches so far are nowhere else)
        windows, manual = (None, None) if self.retries is None else (self.retries.windows, self.retries.manual)
        lag = self.pipeline.read_lag or 0
        self._overrides.restore()
        self.retries = self.pipeline.read_lag = None
        candidates: list[Any] = [policy for policy in self._dispatch.policies if hasattr(policy, "wants_retry")]
        retrier = next((policy for policy in candidates if policy.wants_retry()), None)
        if guard is None or (retrier is None and not self.subscribers):
            return
        module, device = trainer.lightning_module, trainer.strategy.root_device
        copies = retrier is not None or any(copies for _, copies in self.subscribers)
        if windows is None and manual is None:
            lag = read_lag(trainer, retries=retrier is not None or (copies and trainer.world_size > 1))
        self.pipeline.read_lag = lag
        if module.automatic_optimization:
            if windows is None:
                most = math.inf if retrier is not None else self.most_batches
                windows = Windows(module, self.results, device, lag + 1, copies, most)
            internals.on_closure(self._overrides, trainer, self._on_closure)
        elif manual is None and self.subscribers:
            manual = ManualWindows(module, self.results, device, lag, copies, self.most_batches)
        self.retries = Retries(
            trainer,
            retrier,
            guard,
            windows,
            manual,
            MetricUndo(module, self.results),
            step=self._try_step,
            drain=self.pipeline.reads.drain,
            forget_losses=self.pipeline.forget_losses,
            deliver=self._deliver,
            show=self._show,
            keeps_state=copies and windows is not None,
            is_ending=lambda: self.ending,
        )

    def _set_hold(self) -> None:
        """After how many bad updates in a row the device holds those that follow, until the host has answered."""
        if self.guard is None:
            return
        if self.retries is None or not self.retries.holds:
            self.guard.patience = self._dispatch.patience
        else:  # the host answers to a bad step first: at once, or after the one that is under way
            self.guard.patience = 0 if self.pipeline.read_lag else math.inf

    def _try_step(self, optimizer: Optimizer, model: Any, closure: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        assert self._hooks is not None
        return self._hooks.step(optimizer, model, closure, kwargs)

    def _on_closure(self, closure: Any, kwargs: dict[str, Any]) -> None:
        if self._is_ours() and self.retries is not None and self.retries.windows is not None:
            self.retries.windows.add(closure, kwargs, self._uncast_for_retry)
            self._uncast_for_retry = None

    def _show(self, bad_step: BadStep, as_it_failed: bool) -> None:
        for listener, copies in self.subscribers:
            if copies == as_it_failed:
                self._dispatch.contain(listener, bad_step)
