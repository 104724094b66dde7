"""One object per Trainer and fit: it owns the hooks into the step and shows its policies one record of each.

The first callback's `setup` makes it, the last one's `teardown` removes it. In between it stands in (`taps.py`) for
methods of the Trainer's precision plugin, as attributes of that instance, so that the plugin keeps its class, which
checkpoints are keyed by, and for `step` of each optimizer:

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
from typing import Any, Protocol

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from lightning_stability._compat import MisconfigurationException, is_overridden
from lightning_stability.events import EventLog
from lightning_stability.health import GradientMeter, LateReads, StepRecord
from lightning_stability.health.loss_scale import forgive_, scale_tensor, unscales_itself
from lightning_stability.recovery import Guard
from lightning_stability.runtime.outcomes import Outcomes
from lightning_stability.runtime.retries import Retries
from lightning_stability.runtime.run_events import RunEvents
from lightning_stability.runtime.steps import GRAD_SCALER, NO_LOSS, OpenStep, RecordDraft, Window
from lightning_stability.runtime.taps import Once, PluginTap, StepStandIn
from lightning_stability.runtime.trainers import (
    is_clipped_to_the_bit,
    log_folder,
    logger_step,
    refuse_optimizer,
    refuse_strategy,
    validation_is_due,
)


class Policy(Protocol):
    """What a callback registers with the runtime: usually itself."""

    read_every: int
    """How many steps may pass before records are handed over. Several at a time cost less."""

    guards: bool
    """Whether bad updates shall be skipped."""

    patience: float
    """How many bad updates in a row the run may go on after; `math.inf` for any number."""

    reads_steps: bool
    """Whether it has to do with records at all; a run in which nobody has is not measured."""

    automatic: bool
    """Whether it came with the environment, and has to leave a run as it would be without."""

    asked_for: bool
    """Whether somebody named it. Where nobody did, a clean run gets no file."""

    def on_record(self, record: StepRecord) -> None:
        """Called once for each optimizer step, in order, some time after it."""

    def wants_update(self, logger_step: int) -> bool:
        """Whether the sizes of this step's update and weights shall be measured too."""

    def stand_aside(self, trainer: Any, reason: object) -> None:
        """Called on an automatic policy that this run cannot be served with: it detaches itself."""


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
        self._guard: Guard | None = None
        self._distributed = trainer.world_size > 1
        self._outcomes = Outcomes(self)
        self._retries: Retries | None = None
        self._recent: deque[tuple[int, Any]] = deque(maxlen=2)
        self._policies: list[Policy] = []
        self._reads = LateReads()
        self._meters: dict[Optimizer, GradientMeter] = {}
        self._stand_ins: dict[Optimizer, StepStandIn] = {}
        self._window = Window()
        self._last_window = Window()
        self._step: OpenStep | None = None
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
            self._stand_in_for(optimizer)
        if self._guard is None and self._shall_guard():
            self._guard = Guard(module, self.results, self._distributed)
            self._guard.patience = min(policy.patience for policy in self._policies)
            if not all(policy.automatic for policy in self._policies if policy.guards):
                for optimizer in trainer.optimizers:
                    self._say_what_it_costs(optimizer)
        retrier: Any = next((policy for policy in self._policies if hasattr(policy, "wants_retry")), None)
        can_retry = self._guard is not None and retrier is not None and retrier.wants_retry()
        if self._retries is None and can_retry:
            assert self._guard is not None
            self._retries = Retries(self, retrier, self._guard, module)
            self._hold_only_without_retries()

    def results(self) -> Any:
        """What `self.log` accumulates in the epoch."""
        return self.trainer.fit_loop.epoch_loop._results

    def _hold_only_without_retries(self) -> None:
        """The device must not hold updates after a bad step that is going to be trained again."""
        assert self._guard is not None
        patience = min(policy.patience for policy in self._policies)
        self._guard.patience = math.inf if self._retries is not None else patience

    def use_plugin(self, plugin: Any) -> None:
        """Train with another precision plugin from now on.

        Args:
            plugin: Of the Trainer's namespace.
        """
        self._tap.remove()
        self.trainer.strategy.precision_plugin = plugin
        self._tap = PluginTap(plugin, self)
        self._meters.clear()
        self._outcomes.forget_skips()
        if self._guard is not None:
            self._guard.rescan()  # buffers may have changed their type

    def begin_batch(self, batch: Any) -> None:
        """A batch is about to enter `training_step`; asked by each callback, done once.

        Args:
            batch: The batch.
        """
        if self._guard is None:
            return
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if not self._recent or self._recent[-1][0] != number:
            self._recent.append((number, batch))
            self._guard.begin_batch()

    def reject_batch(self, rejected: Tensor) -> None:
        """The batch that has begun is not to be trained on: its window's update is discarded.

        Args:
            rejected: 1.0 if that is so; 0-dimensional, and the same on all ranks.
        """
        if self._guard is not None:
            self._guard.reject(rejected)

    def end_batch(self) -> None:
        """`training_step` and its optimizer steps are through, and no validation or save has come yet."""
        self.uncast = None
        if self._guard is not None:
            if self._retries is not None:
                self.tell(*self._retries.take_arrived())
            self._guard.settle_batch()
            if validation_is_due(self.trainer) or self.trainer.is_last_batch:
                self.drain()

    def settle_batch(self) -> None:
        """A forward pass without a backward pass has to be judged before any callback's `on_train_batch_end`."""
        if self._guard is not None and self.is_ours():
            self._guard.settle_batch()

    def begin_epoch(self) -> None:
        """An epoch begins."""
        if self._guard is not None:
            self._guard.rescan()
        if self._retries is not None:
            self._retries.rescan()

    def end_epoch(self) -> None:
        """An epoch ends; its metrics are computed next."""
        self.drain()
        if self._guard is not None:
            self._guard.end_epoch()

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
        retrier: Any = None if self._retries is None else self._retries.retrier
        if self._retries is not None and retrier is policy:
            self.tell(*self._retries.take_arrived())
            self._retries.remove()
            self._retries = None
        if self._guard is not None and not any(policy.guards for policy in self._policies):
            self._guard = None
        elif self._guard is not None:
            self._hold_only_without_retries()

    def drain(self) -> None:
        """Wait for the records of all steps taken so far and hand them to the policies."""
        if self._guard is not None:
            self._guard.settle_all()
        self._reads.drain()

    def close(self) -> None:
        """Give the Trainer's plugin and optimizers back as they were and drop what was not read."""
        self._tap.remove()
        if self._retries is not None:
            self._retries.remove()
        for stand_in in self._stand_ins.values():
            stand_in.remove()
        self._stand_ins.clear()
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

    # The step, in the order in which the plugin calls.

    def begin_step(self, optimizer: Optimizer) -> None:
        """An optimizer step starts; its closure, if it has one, has not run yet."""
        self._step = None
        if self.is_ours() and self._reads_steps():
            self._step = OpenStep(optimizer)
            self._stand_in_for(optimizer)

    def note_input(self, batch: Any) -> None:
        """A batch is about to be cast to the precision's own type.

        Args:
            batch: As the loader gave it.
        """
        if self.trainer.training and getattr(self._tap.plugin, "_desired_input_dtype", None) == torch.float16:
            self.uncast = batch
        if self._retries is not None:
            self._retries.note_input(batch)

    def note_loss(self, loss: Tensor) -> None:
        """A backward pass is about to run from this loss.

        Args:
            loss: With its graph.
        """
        if self._guard is not None and self.is_ours():
            self._outcomes.note_loss(loss)
            self._guard.note_loss(loss)
        if not self._reads_steps():
            return  # no step would close the window
        loss = loss.detach()
        if loss.dim():
            loss = loss.sum()
        elif not self.trainer.lightning_module.automatic_optimization:
            loss = loss.clone()  # it is the user's tensor; in automatic optimization Lightning just made it
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        self._window.add(loss, progress.total.ready, progress.current.ready - 1)

    def after_backward(self) -> None:
        """The backward pass is through."""
        if self._guard is not None and self.is_ours():
            self._guard.after_backward()

    def measure(self, optimizer: Optimizer, module: Any) -> None:
        """The gradients are final but for clipping."""
        step = self._step
        if step is None or step.optimizer is not optimizer:
            return
        meter = self._meters.get(optimizer)
        if meter is None or not meter.is_current():
            names = {parameter: name for name, parameter in module.named_parameters()}
            self._outcomes.rename(names, changed=meter is not None)
            meter = GradientMeter(optimizer, names, self._drives_clipping(module, optimizer))
            self._meters[optimizer] = meter
        plugin = self._tap.plugin
        scalars = dict(step.take_learning_rates())
        scale = scale_tensor(plugin)
        if scale is not None:
            scalars["loss_scale"] = scale
        window = self._close_window(step)
        kept = {} if window.loss is None else {"loss": window.loss}
        if self._guard is not None and window.batches > 1:
            kept["bad_batch"] = window.first_bad()
        meter.measure(scalars, kept)
        step.scalar_names = tuple(scalars)
        step.logger_step = logger_step(self.trainer)
        if step.meter is None and any(policy.wants_update(step.logger_step) for policy in self._policies):
            meter.remember_weights()
        step.meter = meter
        step.divide_by_scale = scale is not None and unscales_itself(optimizer)
        if self._guard is not None:
            scaled_by = scale if step.divide_by_scale else None
            total_norm, largest_norm = meter.total_norm(), meter.largest_norm
            step.verdict = self._guard.judge(optimizer, total_norm, largest_norm, scaled_by, window.loss)
            self._forgive(step)

    def after_clipping(self, optimizer: Optimizer, module: Any) -> None:
        """A module that clips in its own way may have spoilt its gradients: look at them once more."""
        step = self._step
        if step is None or step.meter is None or step.verdict is None or step.optimizer is not optimizer:
            return
        if is_overridden("configure_gradient_clipping", module):
            assert self._guard is not None
            self._guard.judge_again(step.verdict, step.meter.total_norm_now())

    def update(self, optimizer: Optimizer, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The optimizer is called: let it, unless the step is bad.

        Args:
            optimizer: The bare torch optimizer.
            original: Its own `step`.
            args: What it was called with.
            kwargs: What it was called with.
        """
        if not self.is_ours():
            return original(*args, **kwargs)
        if self._guard is None:
            if self._step is not None and self._step.optimizer is optimizer:
                self._step.called = True
                self._step.found_inf = getattr(optimizer, "found_inf", None)
            return original(*args, **kwargs)
        lightning_does_not_know = self._step is None
        if lightning_does_not_know:  # `optimizers(use_pl_optimizer=False)`
            self.begin_step(optimizer)
        result = self._guarded_update(self._guard, optimizer, original, args, kwargs)
        if lightning_does_not_know:
            self.finish_step()
        return result

    def _guarded_update(
        self, guard: Guard, optimizer: Optimizer, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        arguments = {**dict(zip(("closure",), args, strict=False)), **kwargs}
        closure, result = arguments.get("closure"), None
        once: Once | None = None
        if closure is not None:
            # The closure makes the gradients, so it has to run before anything can be said of them.
            with torch.enable_grad():
                result = closure()
            once = arguments["closure"] = Once(result, closure, optimizer)
        step = self._step
        assert step is not None
        if step.meter is None:
            self.measure(optimizer, self.trainer.lightning_module)
        if step.verdict is None:  # a second optimizer inside of the first one's step
            return original(**arguments)
        step.called = True
        self._forgive(step)
        with guard.decide(optimizer, step.verdict) as goes_ahead:
            if goes_ahead:
                result = original(**arguments)
        if goes_ahead and once is not None and self.trainer.lightning_module.automatic_optimization:
            once.check()
        step.found_inf = step.verdict.found_inf
        guard.after_step()
        return result

    def clip_by_norm(self, optimizer: Optimizer, max_norm: float) -> bool:
        """Clip with the norm measured just before; False if there is none that may be used."""
        step = self._step
        if step is None or step.meter is None or step.optimizer is not optimizer:
            return False
        if not step.meter.drives_clipping:
            return False
        step.meter.clip_(float(max_norm))
        return True

    def finish_step(self) -> None:
        """The optimizer has stepped, or was kept from it."""
        step, self._step = self._step, None
        if step is None or step.meter is None:
            return
        if self._guard is not None:
            self._guard.end_step(step.optimizer)
        trainer = self.trainer
        for name, scalar in step.late_scalars().items():
            step.meter.put(name, scalar)
        # The progress counters have not moved yet in automatic optimization, nor in manual: Lightning does it
        # after us.
        record = RecordDraft(
            step=trainer.global_step,
            logger_step=step.logger_step,
            epoch=trainer.current_epoch,
            optimizer=self._index_of(step.optimizer),
            batches=step.batches,
            batch_indices=tuple(self._last_window.indices),
            batch_numbers=tuple(self._last_window.numbers),
            learning_rates=step.learning_rates,
            parameter_names=step.meter.parameter_names,
            largest_norm=step.meter.largest_norm,
            divide_by_scale=step.divide_by_scale,
            skipped_by=None if step.called else NO_LOSS if step.batches == 0 else GRAD_SCALER,
            skipped_by_guard=step.verdict is not None and bool(step.verdict.skipped),
        )
        step.meter.send(self._reads, lambda measurement: self._hand_over(record.complete(measurement)))
        self._read(record, scaled="loss_scale" in step.scalar_names)

    def _read(self, record: RecordDraft, scaled: bool) -> None:
        """Hand over what has arrived; wait where somebody has to act on it at this very step."""
        if self._guard is None:
            self._reads.poll()
        elif record.skipped_by or record.skipped_by_guard or self._retries is not None:
            self._reads.drain()
        elif self._distributed:
            # All ranks have to hear of a step after the same number of steps. (Lightning itself reads a flag from
            # the device at every step of a distributed run.)
            self._reads.drain(keep=0 if scaled else 1)
        else:
            self._reads.poll()

    def after_step(self, optimizer: Optimizer, model: Any, result: Any, kwargs: dict[str, Any]) -> Any:
        """The plugin's `optimizer_step` has returned.

        Args:
            optimizer: The bare torch optimizer.
            model: The LightningModule.
            result: What it returned.
            kwargs: What else it was called with.
        """
        return result if self._retries is None else self._retries.after_step(optimizer, model, result, kwargs)

    def try_step(self, optimizer: Optimizer, model: Any, closure: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        """Step, in the precision of now.

        Args:
            optimizer: The bare torch optimizer.
            model: The LightningModule.
            closure: Runs the forward and backward pass of the window's last batch.
            kwargs: What else `optimizer_step` is called with.
        """
        return self._tap.step(optimizer, model, closure, kwargs)

    def forget_window(self) -> None:
        """The backward passes since the last step do not count: they are going to be run again."""
        self._window = Window()

    # Parts of the above.

    def _shall_guard(self) -> bool:
        """Whether a policy wants updates guarded. If they cannot be, automatic policies leave; others refuse."""
        guarding = [policy for policy in self._policies if policy.guards]
        try:
            for optimizer in self.trainer.optimizers if guarding else ():
                refuse_optimizer(optimizer)
        except MisconfigurationException as refusal:
            if not all(policy.automatic for policy in guarding):
                raise
            for policy in guarding:
                policy.stand_aside(self.trainer, refusal)
            return False
        return bool(guarding)

    def _hand_over(self, record: StepRecord) -> None:
        if self._guard is not None:
            self._outcomes.complete(record, self._guard)
        if self._retries is None:
            self.tell(record)
        else:
            self._retries.note_record(record)

    def tell(self, *records: StepRecord) -> None:
        """Show the policies what became of steps.

        Args:
            records: In the order of the steps.
        """
        for record in records:
            for policy in list(self._policies):
                policy.on_record(record)

    def _close_window(self, step: OpenStep) -> Window:
        """The backward passes that this step's gradients come from."""
        if step.meter is None:
            if self._window.batches:
                self._last_window, self._window = self._window, Window()
            elif self.trainer.lightning_module.automatic_optimization:
                self._last_window = Window()
            # else: a second optimizer stepping on the same backward pass
            step.batches = self._last_window.batches
        return self._last_window

    def _drives_clipping(self, module: Any, optimizer: Optimizer) -> bool:
        plugin_class = type(self._tap.plugin)
        return bool(
            (is_clipped_to_the_bit(optimizer) or not all(policy.automatic for policy in self._policies))
            and self.trainer.gradient_clip_val
            and str(self.trainer.gradient_clip_algorithm or "norm").lower().endswith("norm")
            and module.automatic_optimization
            and not is_overridden("configure_gradient_clipping", module)
            # a plugin of the user's, or of a strategy that clips in its own way
            and plugin_class.clip_grad_by_norm.__qualname__ == "Precision.clip_grad_by_norm"
            and plugin_class.main_params.__qualname__ == "Precision.main_params"
        )

    def _say_what_it_costs(self, optimizer: Optimizer) -> None:
        """One line for an optimizer that cannot be told to skip without a host read."""
        group = optimizer.param_groups[0]
        if group.get("fused"):
            return
        name = type(optimizer).__name__
        has_fused = isinstance(optimizer, (SGD, Adam, AdamW, Adagrad))
        if "foreach" in group:
            on_cpu = any(parameter.device.type == "cpu" for parameter in group["params"])
            foreach = not on_cpu if group["foreach"] is None else group["foreach"]
            name += "(foreach)" if foreach else "(for-loop)"
        # Lightning refuses to clip with a fused optimizer under a GradScaler
        clips = self.trainer.gradient_clip_val and getattr(self._tap.plugin, "scaler", None) is not None
        rank_zero_info(f"{name}: one read per step" + ("; fused=True removes it" if has_fused and not clips else ""))

    def _forgive(self, step: OpenStep) -> None:
        """GradScaler shall not halve its scale for an input that has been rejected.

        Called after it has looked: it does so in `unscale_`, or, for optimizers that unscale themselves, in its `step`.
        """
        if step.verdict is not None and step.verdict.rejected is not None:
            forgive_(self._tap.plugin, step.optimizer, step.verdict.rejected)

    def _reads_steps(self) -> bool:
        return any(policy.reads_steps for policy in self._policies)

    def is_ours(self) -> bool:
        """Whether the run is training; the learning-rate and batch-size finders do it with other callbacks."""
        trainer = self._trainer()  # gone, if a scheduler has kept our stand-in in an optimizer that outlives it
        return trainer is not None and any(policy in trainer.callbacks for policy in self._policies)

    def _stand_in_for(self, optimizer: Optimizer) -> None:
        if optimizer not in self._stand_ins:
            self._stand_ins[optimizer] = StepStandIn(optimizer, self)

    def _index_of(self, optimizer: Optimizer) -> int:
        for index, candidate in enumerate(self.trainer.optimizers):
            if candidate is optimizer:
                return index
        return 0


_RUNTIMES: weakref.WeakKeyDictionary[Any, Runtime] = weakref.WeakKeyDictionary()


def runtime_of(trainer: Any) -> Runtime | None:
    """The Trainer's runtime, while one of our callbacks is set up with it."""
    return _RUNTIMES.get(trainer)
