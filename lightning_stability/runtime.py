"""One object per Trainer and fit: it owns the hooks into the step and shows its policies one record of each.

The first callback's `setup` makes it, the last one's `teardown` removes it. In between it stands in for four
methods of the Trainer's precision plugin (as attributes of that instance, so that the plugin keeps its class,
which checkpoints are keyed by), and for `step` of each optimizer:

    convert_input       the batch, before a 16-true precision casts it
    pre_backward        the loss, before GradScaler multiplies it
    post_backward       the forward pass is judged: what it wrote stays or goes
    _clip_gradients     the last point before clipping: after `unscale_`, after every `on_before_optimizer_step`
    clip_grad_by_norm   clips with the norm just measured
    optimizer_step      the whole step; afterwards the record is on its way to the host
    Optimizer.step      the update itself: everybody's last gate, also with `use_pl_optimizer=False`
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer

from lightning_stability._compat import MisconfigurationException, is_instance_by_name, is_overridden
from lightning_stability.events import EventLog
from lightning_stability.health import GradientMeter, LateReads, StepRecord
from lightning_stability.health.forward_order import forward_order
from lightning_stability.health.gradients import CPU_PIECE, Measurement
from lightning_stability.health.loss_scale import scale_tensor, unscales_itself
from lightning_stability.recovery import Guard, OpenWindow
from lightning_stability.recovery.guard import Verdict

GRAD_SCALER = "GradScaler"
GUARD = "guard"
HALT = "halt"
NO_LOSS = "no loss"

# Strategies whose gradients are not to be had where we look, and what to use in their place.
_REFUSED = {
    "FSDPStrategy": "its parameters are this rank's flat shard; use ModelParallelStrategy (FSDP2)",
    "DeepSpeedStrategy": "its engine keeps and clips the gradients; use DDP or ModelParallelStrategy",
    "XLAStrategy": "its tensors have no multi-tensor norm; leave the callback out",
    "XLAFSDPStrategy": "its tensors have no multi-tensor norm; leave the callback out",
    "SingleDeviceXLAStrategy": "its tensors have no multi-tensor norm; leave the callback out",
}


class Policy(Protocol):
    """What a callback registers with the runtime: usually itself."""

    read_every: int
    """How many steps may pass before records are handed over. Several at a time cost less."""

    guards: bool
    """Whether bad updates shall be skipped."""

    patience: float
    """How many bad updates in a row the run may go on after; `math.inf` for any number."""

    automatic: bool
    """Whether it came with the environment, and has to leave a run as it would be without."""

    def on_record(self, record: StepRecord) -> None:
        """Called once for each optimizer step, in order, some time after it."""

    def wants_update(self, logger_step: int) -> bool:
        """Whether the sizes of this step's update and weights shall be measured too."""

    def stand_aside(self, trainer: Any, reason: object) -> None:
        """Called on an automatic policy that this run cannot be served with: it detaches itself."""


class Retrier(Protocol):
    """A policy that may have a bad step's batches trained again, before any other policy hears of it."""

    def wants_retry(self) -> bool:
        """Whether it could do anything about a bad step now; if so, each step is read at once."""

    def before_retry(self, record: StepRecord) -> None:
        """Change what has to be changed; the batches are trained again next."""

    def after_retry(self, failed: StepRecord, again: StepRecord) -> StepRecord:
        """Keep the change or take it back; returns the record that the other policies get."""

    def cannot_retry(self, record: StepRecord, why: str) -> None:
        """The batches cannot be trained again."""

    def no_memory_for_retry(self, record: StepRecord) -> Exception:
        """What to raise when the device has no room for it."""


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
        _refuse_strategy(trainer)
        self._trainer = weakref.ref(trainer)
        self._guard: Guard | None = None
        self._distributed = trainer.world_size > 1
        self._skips_in_a_row: dict[int, int] = {}
        self._forward_order: dict[str, int] = {}
        self._retrier: Retrier | None = None
        self._open_window: OpenWindow | None = None
        self._make_closure: Any = None
        self._arrived: list[StepRecord] = []
        self._uncast: Any = None
        self._recent: deque[tuple[int, Any]] = deque(maxlen=2)
        self._policies: list[Policy] = []
        self._reads = LateReads()
        self._meters: dict[Optimizer, GradientMeter] = {}
        self._names: dict[Tensor, str] = {}
        self._stand_ins: dict[Optimizer, _StepStandIn] = {}
        self._window = _Window()
        self._last_window = _Window()
        self._step: _OpenStep | None = None
        self.events = EventLog(log_folder(trainer), trainer.global_rank)
        self._tap = _PluginTap(trainer.strategy.precision_plugin, self)

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

    def start(self, module: Any) -> None:
        """Training starts: everything is set up and restored.

        Args:
            module: The LightningModule.

        Raises:
            MisconfigurationException: If an optimizer cannot be guarded.
        """
        trainer = self.trainer
        for optimizer in trainer.optimizers:
            self._stand_in_for(optimizer)
        if self._guard is None and self._shall_guard():
            self._guard = Guard(module, self._results, self._distributed)
            self._guard.patience = min(policy.patience for policy in self._policies)
            if not all(policy.automatic for policy in self._policies if policy.guards):
                for optimizer in trainer.optimizers:
                    self._say_what_it_costs(optimizer)
        retrier: Any = next((policy for policy in self._policies if hasattr(policy, "wants_retry")), None)
        can_retry = self._guard is not None and retrier is not None and retrier.wants_retry()
        if self._retrier is None and can_retry:
            self._retrier = retrier
            self._hold_only_without_retrier()
            if module.automatic_optimization:
                self._open_window = OpenWindow(module, self._results, trainer.strategy.root_device)
                self._make_closure = _ClosureTap(trainer.fit_loop.epoch_loop.automatic_optimization, self)

    def _results(self) -> Any:
        return self.trainer.fit_loop.epoch_loop._results

    def _hold_only_without_retrier(self) -> None:
        """The device must not hold updates after a bad step that is going to be trained again."""
        assert self._guard is not None
        patience = min(policy.patience for policy in self._policies)
        self._guard.patience = math.inf if self._retrier is not None else patience

    def retries_are_over(self) -> None:
        """The retrier has done what it could: steps are read late again and batches are not kept."""
        self._retrier = None
        self._hold_only_without_retrier()
        if self._make_closure is not None:
            self._make_closure.remove()
            self._make_closure = self._open_window = None

    def use_plugin(self, plugin: Any) -> None:
        """Train with another precision plugin from now on.

        Args:
            plugin: Of the Trainer's namespace.
        """
        self._tap.remove()
        self.trainer.strategy.precision_plugin = plugin
        self._tap = _PluginTap(plugin, self)
        self._meters.clear()
        self._skips_in_a_row.clear()
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

    def end_batch(self) -> None:
        """`training_step` and its optimizer steps are through, and no validation or save has come yet."""
        if self._guard is not None:
            arrived, self._arrived = self._arrived, []
            self._tell(*arrived)  # of steps that Lightning did not know of
            self._guard.settle_batch()
            if _validation_is_due(self.trainer) or self.trainer.is_last_batch:
                self.drain()

    def settle_batch(self) -> None:
        """A forward pass without a backward pass has to be judged before any callback's `on_train_batch_end`."""
        if self._guard is not None and self._is_ours():
            self._guard.settle_batch()

    def begin_epoch(self) -> None:
        """An epoch begins."""
        if self._guard is not None:
            self._guard.rescan()
        if self._open_window is not None:
            self._open_window.rescan()

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
        """Take a policy out; with the last one the Trainer is as it was before."""
        if policy in self._policies:
            self._policies.remove(policy)
        if not self._policies:
            self.close()

    def drain(self) -> None:
        """Wait for the records of all steps taken so far and hand them to the policies."""
        if self._guard is not None:
            self._guard.settle_all()
        self._reads.drain()

    def close(self) -> None:
        """Give the Trainer's plugin and optimizers back as they were and drop what was not read."""
        self._tap.remove()
        if self._make_closure is not None:
            self._make_closure.remove()
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
        if self._is_ours():
            self._step = _OpenStep(optimizer)
            self._stand_in_for(optimizer)

    def note_input(self, batch: Any) -> None:
        """A batch is about to be cast to the precision's own type.

        Args:
            batch: As the loader gave it.
        """
        if self._open_window is not None:
            self._uncast = batch

    def note_closure(self, closure: Callable[[], Any], kwargs: dict[str, Any]) -> None:
        """A batch is about to be trained.

        Args:
            closure: Runs its forward and backward pass.
            kwargs: What `training_step` will be called with.
        """
        if self._open_window is not None and self._is_ours():
            self._open_window.add(closure, kwargs, self._uncast)
            self._uncast = None

    def note_loss(self, loss: Tensor) -> None:
        """A backward pass is about to run from this loss.

        Args:
            loss: With its graph.
        """
        if self._guard is not None and self._is_ours():
            if not self._forward_order:
                names = {parameter: name for name, parameter in self.trainer.lightning_module.named_parameters()}
                self._forward_order = forward_order(loss, names) or {"": 0}
            self._guard.note_loss(loss)
        loss = loss.detach()
        if loss.dim():
            loss = loss.sum()
        elif not self.trainer.lightning_module.automatic_optimization:
            loss = loss.clone()  # it is the user's tensor; in automatic optimization Lightning just made it
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        self._window.add(loss, progress.total.ready, progress.current.ready - 1)

    def after_backward(self) -> None:
        """The backward pass is through."""
        if self._guard is not None and self._is_ours():
            self._guard.after_backward()

    def measure(self, optimizer: Optimizer, module: Any) -> None:
        """The gradients are final but for clipping."""
        step = self._step
        if step is None or step.optimizer is not optimizer:
            return
        meter = self._meters.get(optimizer)
        if meter is None or not meter.is_current():
            if meter is not None:
                self._forward_order = {}  # other parameters are trained now
            self._names = {parameter: name for name, parameter in module.named_parameters()}
            meter = self._meters[optimizer] = GradientMeter(
                optimizer, self._names, self._drives_clipping(module, optimizer)
            )
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
            step.verdict = self._guard.judge(meter.total_norm(), meter.largest_norm, scaled_by, window.loss)

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
        if not self._is_ours():
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
        if closure is not None:
            # The closure makes the gradients, so it has to run before anything can be said of them.
            with torch.enable_grad():
                result = closure()
            arguments["closure"] = _Once(result, closure, optimizer)
        step = self._step
        assert step is not None
        if step.meter is None:
            self.measure(optimizer, self.trainer.lightning_module)
        if step.verdict is None:  # a second optimizer inside of the first one's step
            return original(**arguments)
        step.called = True
        with guard.decide(optimizer, step.verdict) as goes_ahead:
            if goes_ahead:
                result = original(**arguments)
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
        trainer = self.trainer
        for name, scalar in step.late_scalars().items():
            step.meter.put(name, scalar)
        # The progress counters have not moved yet in automatic optimization, nor in manual: Lightning does it
        # after us.
        record = _RecordDraft(
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

    def _read(self, record: _RecordDraft, scaled: bool) -> None:
        """Hand over what has arrived; wait where somebody has to act on it at this very step."""
        if self._guard is None:
            self._reads.poll()
        elif record.skipped_by or record.skipped_by_guard or self._retrier is not None:
            self._reads.drain()
        elif self._distributed:
            # All ranks have to hear of a step after the same number of steps. (Lightning itself reads a flag from
            # the device at every step of a distributed run.)
            self._reads.drain(keep=0 if scaled else 1)
        else:
            self._reads.poll()

    # Parts of the above.

    def _shall_guard(self) -> bool:
        """Whether a policy wants updates guarded. If they cannot be, automatic policies leave; others refuse."""
        guarding = [policy for policy in self._policies if policy.guards]
        try:
            for optimizer in self.trainer.optimizers if guarding else ():
                _refuse_optimizer(optimizer)
        except MisconfigurationException as refusal:
            if not all(policy.automatic for policy in guarding):
                raise
            for policy in guarding:
                policy.stand_aside(self.trainer, refusal)
            return False
        return bool(guarding)

    def _hand_over(self, record: StepRecord) -> None:
        if self._guard is not None:
            self._complete(record, self._guard)
        if self._retrier is None:
            self._tell(record)
        else:
            self._arrived.append(record)  # `after_step` may have it trained again before anybody hears of it

    def _tell(self, *records: StepRecord) -> None:
        for record in records:
            for policy in list(self._policies):
                policy.on_record(record)

    def after_step(self, optimizer: Optimizer, model: Any, result: Any, kwargs: dict[str, Any]) -> Any:
        """The plugin's `optimizer_step` has returned; if it was bad, the retrier may have it done again.

        Args:
            optimizer: The bare torch optimizer.
            model: The LightningModule.
            result: What it returned.
            kwargs: What else it was called with.
        """
        if self._retrier is None:
            return result
        arrived, self._arrived = self._arrived, []
        if arrived and arrived[-1].outcome == "bad" and self._retrier.wants_retry():
            failed = arrived.pop()
            self._tell(*arrived)
            result = self._retry(self._retrier, failed, optimizer, model, result, kwargs)
        else:
            self._tell(*arrived)
        if self._open_window is not None:
            self._open_window.close()
        return result

    def _retry(
        self, retrier: Retrier, failed: StepRecord, optimizer: Optimizer, model: Any, result: Any, kwargs: Any
    ) -> Any:
        window, guard = self._open_window, self._guard
        assert guard is not None
        if window is None or window.changed_in_place():
            why = "manual optimization does not say which batches an update comes from"
            retrier.cannot_retry(failed, why if window is None else "`training_step` changes its batch in place")
            self._tell(failed)
            return result
        casts = hasattr(self._tap.plugin, "_desired_input_dtype")
        retrier.before_retry(failed)
        guard.forget_batch()
        window.restore()
        self._window = _Window()
        *closures, last = window.closures(self._converted if casts else None)
        try:
            for closure in closures:
                guard.begin_batch()
                with getattr(self.trainer.strategy, "block_backward_sync", contextlib.nullcontext)():
                    closure()
            guard.begin_batch()
            result = self._tap.step(optimizer, model, last, kwargs)
        except torch.cuda.OutOfMemoryError as error:
            raise retrier.no_memory_for_retry(failed) from error
        again = self._arrived.pop()
        self._arrived.clear()
        self._tell(retrier.after_retry(failed, again))
        return result

    def _converted(self, batch: Any) -> Any:
        """A batch for the precision of now, as Lightning makes it."""
        trainer = self.trainer
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _close_window(self, step: _OpenStep) -> _Window:
        """The backward passes that this step's gradients come from."""
        if step.meter is None:
            if self._window.batches:
                self._last_window, self._window = self._window, _Window()
            elif self.trainer.lightning_module.automatic_optimization:
                self._last_window = _Window()
            # else: a second optimizer stepping on the same backward pass
            step.batches = self._last_window.batches
        return self._last_window

    def _drives_clipping(self, module: Any, optimizer: Optimizer) -> bool:
        plugin_class = type(self._tap.plugin)
        return bool(
            (_is_clipped_to_the_bit(optimizer) or not all(policy.automatic for policy in self._policies))
            and self.trainer.gradient_clip_val
            and str(self.trainer.gradient_clip_algorithm or "norm").lower().endswith("norm")
            and module.automatic_optimization
            and not is_overridden("configure_gradient_clipping", module)
            # a plugin of the user's, or of a strategy that clips in its own way
            and plugin_class.clip_grad_by_norm.__qualname__ == "Precision.clip_grad_by_norm"
            and plugin_class.main_params.__qualname__ == "Precision.main_params"
        )

    def _complete(self, record: StepRecord, guard: Guard) -> None:
        """What only the runtime knows of a step."""
        if record.buffer_index is not None:
            record.nonfinite_buffer = guard.name_of_buffer(record.buffer_index)
        if record.skipped_by is not None and record.skipped_by != NO_LOSS:
            record.bad_loss_ranks = self._ranks_with_bad_loss(record)
        if not record.gradients_finite:
            record.culprit = self._culprit(record)
        row = self._skips_in_a_row.get(record.optimizer, 0)
        if record.skipped_by is None:
            record.outcome, row = "taken", 0
        elif record.skipped_by == NO_LOSS:
            record.outcome = "no_loss"
        elif record.skipped_by == HALT:
            record.outcome = "held"
        elif record.skipped_by == GRAD_SCALER and not record.bad_loss_ranks and not record.nonfinite_buffer:
            row += 1
            collapsed = record.loss_scale is not None and record.loss_scale < self.min_loss_scale
            record.outcome = "bad" if collapsed or row > self.max_consecutive_skips else "ordinary_skip"
        else:
            record.outcome = "bad"
        self._skips_in_a_row[record.optimizer] = row

    def _ranks_with_bad_loss(self, record: StepRecord) -> tuple[int, ...]:
        trainer = self.trainer
        if not self._distributed:
            return () if record.loss_finite else (0,)
        # A collective, but only after a step that all ranks have skipped.
        flags = torch.zeros(trainer.world_size, device=trainer.strategy.root_device)
        flags[trainer.global_rank] = float(not record.loss_finite)
        dist.all_reduce(flags)
        return tuple(rank for rank, flag in enumerate(flags.tolist()) if flag)

    def _culprit(self, record: StepRecord) -> str | None:
        """The parameter nearest to where the gradient went bad: behind it, nearer to the loss, it was finite."""
        names = record.parameter_names
        if record.gradients == "overflow":
            return names[int(record.grad_norms.argmax())]
        bad = [name for name, norm in zip(names, record.grad_norms.tolist(), strict=True) if not math.isfinite(norm)]
        if not bad:
            return None
        module_order = {name: place for place, name in enumerate(self._names.values())}
        return max(bad, key=lambda name: (self._forward_order.get(name, -1), module_order.get(name, -1)))

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

    def _is_ours(self) -> bool:
        """Whether the run is training; the learning-rate and batch-size finders do it with other callbacks."""
        trainer = self._trainer()  # gone, if a scheduler has kept our stand-in in an optimizer that outlives it
        return trainer is not None and any(policy in trainer.callbacks for policy in self._policies)

    def _stand_in_for(self, optimizer: Optimizer) -> None:
        if optimizer not in self._stand_ins:
            self._stand_ins[optimizer] = _StepStandIn(optimizer, self)

    def _index_of(self, optimizer: Optimizer) -> int:
        for index, candidate in enumerate(self.trainer.optimizers):
            if candidate is optimizer:
                return index
        return 0


@dataclass(slots=True)
class _Window:
    """The backward passes since the last step."""

    loss: Tensor | None = None
    numbers: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    @property
    def batches(self) -> int:
        return len(self.numbers)

    def add(self, loss: Tensor, number: int, index: int) -> None:
        # Lightning has divided each loss by accumulate_grad_batches: their sum is the window's mean.
        self.loss = loss if self.loss is None else self.loss + loss
        if not self.numbers or number != self.numbers[-1]:
            self.numbers.append(number)
            self.indices.append(index)
            self.losses.append(loss)
        else:  # manual optimization may go backward twice in a batch
            self.losses[-1] = self.losses[-1] + loss

    def first_bad(self) -> Tensor:
        """Which of its batches was the first with a loss that is not finite; one past the last if none was."""
        bad = torch.isfinite(torch.stack(self.losses)).logical_not_()
        return torch.where(bad.any(), bad.to(torch.uint8).argmax(), self.batches)


@dataclass(slots=True)
class _OpenStep:
    """An optimizer step that is under way."""

    optimizer: Optimizer
    meter: GradientMeter | None = None
    logger_step: int = 0
    batches: int = 0
    learning_rates: list[float | str] = field(default_factory=list)
    divide_by_scale: bool = False
    called: bool = False
    found_inf: Tensor | None = None
    verdict: Verdict | None = None
    scalar_names: tuple[str, ...] = ()

    def late_scalars(self) -> dict[str, Tensor]:
        """What is known on the device only after the optimizer's call."""
        scalars = {"found_inf": self.found_inf}
        if self.verdict is not None:
            scalars["held"] = self.verdict.held
            if self.verdict.skipped is None:  # decided on the device, or not asked because GradScaler skipped
                scalars["bad"] = self.verdict.bad
            if self.verdict.buffer is not None:
                scalars["buffer_bad"], scalars["buffer_index"] = self.verdict.buffer
        return {name: scalar for name, scalar in scalars.items() if scalar is not None}

    def take_learning_rates(self) -> dict[str, Tensor]:
        """Note each group's learning rate; return those that are on the device, by name."""
        self.learning_rates, on_device = [], {}
        for index, group in enumerate(self.optimizer.param_groups):
            rate = group.get("lr", 0.0)
            if isinstance(rate, Tensor) and rate.device.type != "cpu":
                name = f"learning_rate_{index}"
                on_device[name] = rate
                self.learning_rates.append(name)
            else:
                self.learning_rates.append(float(rate))
        return on_device


@dataclass(slots=True)
class _RecordDraft:
    """What the host knows of a step before its numbers arrive."""

    step: int
    logger_step: int
    epoch: int
    optimizer: int
    batches: int
    batch_indices: tuple[int, ...]
    batch_numbers: tuple[int, ...]
    learning_rates: list[float | str]
    parameter_names: tuple[str, ...]
    largest_norm: float
    divide_by_scale: bool
    skipped_by: str | None
    skipped_by_guard: bool

    def complete(self, measured: Measurement) -> StepRecord:
        scalars = measured.scalars
        scale = scalars.get("loss_scale")
        norms = measured.grad_norms
        if self.divide_by_scale:
            # a scale that ran down to 0 leaves gradients of 0: nan says so, as the division would
            norms = norms / scale if scale else norms * float("nan")
        rates = tuple(scalars[r] if isinstance(r, str) else r for r in self.learning_rates)
        return StepRecord(
            step=self.step,
            logger_step=self.logger_step,
            epoch=self.epoch,
            optimizer=self.optimizer,
            batches=self.batches,
            parameter_names=self.parameter_names,
            largest_norm=self.largest_norm,
            grad_norms=norms,
            loss=scalars.get("loss"),
            loss_scale=scale,
            learning_rates=rates,
            clip_coefficient=scalars.get("clip_coefficient"),
            skipped_by=self._skipped_by(scalars),
            batch_idx=self._of_batch(self.batch_indices, scalars),
            batch_number=self._of_batch(self.batch_numbers, scalars),
            buffer_index=int(scalars["buffer_index"]) if scalars.get("buffer_bad") else None,
            weight_norms=measured.weight_norms,
            update_norms=measured.update_norms,
        )

    def _skipped_by(self, scalars: dict[str, float]) -> str | None:
        if scalars.get("held"):
            return HALT
        if self.skipped_by is not None or scalars.get("found_inf"):
            return self.skipped_by or GRAD_SCALER
        return GUARD if self.skipped_by_guard or scalars.get("bad") else None

    def _of_batch(self, values: tuple[int, ...], scalars: dict[str, float]) -> int:
        if not values:
            return -1
        return values[min(int(scalars.get("bad_batch", len(values))), len(values) - 1)]


class _PluginTap:
    """Stands in for methods of one precision plugin until it is removed."""

    _METHODS = (
        "convert_input",
        "pre_backward",
        "post_backward",
        "_clip_gradients",
        "clip_grad_by_norm",
        "optimizer_step",
    )

    def __init__(self, plugin: Any, runtime: Runtime) -> None:
        self.plugin = plugin
        self._runtime = runtime
        self._originals: dict[str, Callable[..., Any]] = {name: getattr(plugin, name) for name in self._METHODS}
        for name in self._METHODS:
            setattr(plugin, name, getattr(self, name))

    def remove(self) -> None:
        for name in self._METHODS:
            if vars(self.plugin).get(name) == getattr(self, name):
                delattr(self.plugin, name)

    def pre_backward(self, tensor: Tensor, module: Any) -> Any:
        self._runtime.note_loss(tensor)
        return self._originals["pre_backward"](tensor, module)

    def post_backward(self, tensor: Tensor, module: Any) -> Any:
        self._runtime.after_backward()
        return self._originals["post_backward"](tensor, module)

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        result = self.step(optimizer, model, closure, kwargs)
        return self._runtime.after_step(optimizer, model, result, kwargs)

    def step(self, optimizer: Any, model: Any, closure: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        """One try of an optimizer step."""
        self._runtime.begin_step(optimizer)
        result = self._originals["optimizer_step"](optimizer, model=model, closure=closure, **kwargs)
        self._runtime.finish_step()
        self._runtime.settle_batch()
        return result

    def convert_input(self, data: Any) -> Any:
        self._runtime.note_input(data)
        return self._originals["convert_input"](data)

    def _clip_gradients(self, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        module = self._runtime.trainer.lightning_module
        self._runtime.measure(optimizer, module)
        self._originals["_clip_gradients"](model, optimizer, *args, **kwargs)
        self._runtime.after_clipping(optimizer, module)

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        if not self._runtime.clip_by_norm(optimizer, clip_val):
            self._originals["clip_grad_by_norm"](optimizer, clip_val)


class _ClosureTap:
    """Learns of each batch's closure, which runs its forward and backward pass, until it is removed."""

    def __init__(self, automatic_optimization: Any, runtime: Runtime) -> None:
        self._loop = automatic_optimization
        original = automatic_optimization._make_closure

        def make_closure(kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
            closure = original(kwargs, optimizer, batch_idx)
            runtime.note_closure(closure, kwargs)
            return closure

        automatic_optimization._make_closure = make_closure

    def remove(self) -> None:
        vars(self._loop).pop("_make_closure", None)


class _StepStandIn:
    """Stands in for one optimizer's `step`, as learning-rate schedulers do, until it is removed."""

    def __init__(self, optimizer: Optimizer, runtime: Runtime) -> None:
        self._optimizer = optimizer
        self._own = vars(optimizer).get("step")  # a scheduler's, usually
        self._active = True
        original = optimizer.step

        @functools.wraps(original)
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            return runtime.update(optimizer, original, args, kwargs) if self._active else original(*args, **kwargs)

        # A bound method, since a scheduler that is made later (SWA's) wraps its `__func__`.
        self._step = types.MethodType(step, optimizer)
        optimizer.step = self._step  # type: ignore[method-assign]

    def remove(self) -> None:
        self._active = False
        if vars(self._optimizer).get("step") is not self._step:
            return  # somebody stood in for us
        if self._own is None:
            del self._optimizer.step  # type: ignore[method-assign]
        else:
            self._optimizer.step = self._own  # type: ignore[method-assign]


_ASKS_AGAIN: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class _Once:
    """A closure that has been run: gives its result, and runs again only if the optimizer asks again."""

    def __init__(self, result: Any, closure: Callable[[], Any], optimizer: Optimizer) -> None:
        self._result = result
        self._closure = closure
        self._optimizer = optimizer
        self._asked = False

    def __call__(self) -> Any:
        if not self._asked:
            self._asked = True
            return self._result
        if self._optimizer not in _ASKS_AGAIN:
            _ASKS_AGAIN.add(self._optimizer)
            rank_zero_warn(
                f"{type(self._optimizer).__name__} evaluates its closure more than once a step: only the first"
                " gradients of each step are checked, later ones can still be non-finite."
            )
        return self._closure()


_RUNTIMES: weakref.WeakKeyDictionary[Any, Runtime] = weakref.WeakKeyDictionary()


def runtime_of(trainer: Any) -> Runtime | None:
    """The Trainer's runtime, while one of our callbacks is set up with it."""
    return _RUNTIMES.get(trainer)


def logger_step(trainer: Any) -> int:
    """The step under which Lightning would log at this point of the training loop."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def log_folder(trainer: Any) -> str | None:
    """The folder of this run's first logger that has one. All ranks have to ask: Lightning broadcasts.

    A logger with a version gets `save_dir/name/version`, which is where Lightning puts its checkpoints.
    """
    folder = None
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None)
        if folder is None and logger.save_dir is not None and logger.version is not None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            folder = "/".join((str(logger.save_dir), str(logger.name), version))
        if folder is not None:
            break
    answer: str | None = trainer.strategy.broadcast(folder)
    return answer


def _refuse_strategy(trainer: Any) -> None:
    for name, reason in _REFUSED.items():
        if is_instance_by_name(trainer.strategy, name):
            raise MisconfigurationException(
                f"gradients cannot be measured under {type(trainer.strategy).__name__}: {reason}."
            )


def _refuse_optimizer(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise MisconfigurationException(
            f"{name} cannot be guarded: it evaluates several gradients within one step and keeps each of them. Use"
            " another optimizer, or leave out the callbacks that skip updates."
        )
    for group in optimizer.param_groups:
        eps = group.get("eps")
        half = any(parameter.dtype == torch.float16 for parameter in group["params"])
        if half and isinstance(eps, float) and eps > 0.0 and float(torch.tensor(eps, dtype=torch.float16)) == 0.0:
            raise MisconfigurationException(
                f"{name}(eps={eps:g}) with fp16 weights: eps is 0 in fp16, so the first update divides by zero. Give"
                " eps=1e-4 or larger, or train in 16-mixed, bf16-true or 32-true."
            )


def _is_clipped_to_the_bit(optimizer: Optimizer) -> bool:
    """Whether clipping with our norm gives the bits that Lightning's own gives: one kind of fp32 tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kinds = {(parameter.device, parameter.dtype, type(parameter)) for parameter in parameters}
    in_pieces = any(p.device.type == "cpu" and p.numel() > CPU_PIECE for p in parameters)
    return len(kinds) == 1 and parameters[0].dtype == torch.float32 and not _is_sharded(parameters[0]) and not in_pieces


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "device_mesh")


def window_is_open(trainer: Any) -> bool:
    """Whether gradients of earlier batches wait for more before the optimizer steps.

    Args:
        trainer: The Trainer.
    """
    return bool(trainer.fit_loop._should_accumulate()) and trainer.lightning_module.automatic_optimization


def _validation_is_due(trainer: Any) -> bool:
    """Whether Lightning will validate right after this batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and bool(trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))
