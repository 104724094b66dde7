"""One object per Trainer and fit: it owns the hooks into the step and shows its policies one record of each.

The first callback's `setup` makes it, the last one's `teardown` removes it. In between it stands in for four
methods of the Trainer's precision plugin (as attributes of that instance, so that the plugin keeps its class,
which checkpoints are keyed by):

    pre_backward        the loss, before GradScaler multiplies it
    _clip_gradients     the last point before clipping: after `unscale_`, after every
    `on_before_optimizer_step` clip_grad_by_norm   clips with the norm just measured
    optimizer_step      the whole step; afterwards the record is on its way to the host
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from lightning_stability._compat import MisconfigurationException, is_instance_by_name, is_overridden
from lightning_stability.events import EventLog
from lightning_stability.health import GradientMeter, LateReads, StepRecord
from lightning_stability.health.gradients import Measurement
from lightning_stability.health.loss_scale import scale_tensor, unscales_itself

GRAD_SCALER = "GradScaler"
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

    def on_record(self, record: StepRecord) -> None:
        """Called once for each optimizer step, in order, some time after it."""

    def wants_update(self, logger_step: int) -> bool:
        """Whether the sizes of this step's update and weights shall be measured too."""


class Runtime:
    """Measures each optimizer step of one Trainer once, for all policies.

    Args:
        trainer: A Trainer of either namespace, inside `setup`.

    Raises:
        MisconfigurationException: If the Trainer's strategy hides the gradients.
    """

    def __init__(self, trainer: Any) -> None:
        _refuse_strategy(trainer)
        self._trainer = weakref.ref(trainer)
        self._policies: list[Policy] = []
        self._reads = LateReads()
        self._meters: dict[Optimizer, GradientMeter] = {}
        self._names: dict[Tensor, str] = {}
        self._hooks: dict[Optimizer, Any] = {}
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

    def detach(self, policy: Policy) -> None:
        """Take a policy out; with the last one the Trainer is as it was before."""
        if policy in self._policies:
            self._policies.remove(policy)
        if not self._policies:
            self.close()

    def drain(self) -> None:
        """Wait for the records of all steps taken so far and hand them to the policies."""
        self._reads.drain()

    def close(self) -> None:
        """Give the Trainer's plugin and optimizers back as they were and drop what was not read."""
        self._tap.remove()
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
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
        # The learning-rate finder and the batch-size finder train with other callbacks: those steps are not
        # the run's.
        callbacks = self.trainer.callbacks
        if any(policy in callbacks for policy in self._policies):
            self._step = _OpenStep(optimizer)
            self._watch_step_call(optimizer)

    def note_loss(self, loss: Tensor) -> None:
        """A backward pass is about to run from this loss."""
        loss = loss.detach()
        if loss.dim():
            loss = loss.sum()
        elif not self.trainer.lightning_module.automatic_optimization:
            loss = loss.clone()  # it is the user's tensor; in automatic optimization Lightning just made it
        self._window.add(loss, self.trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    def measure(self, optimizer: Optimizer, module: Any) -> None:
        """The gradients are final but for clipping."""
        step = self._step
        if step is None or step.optimizer is not optimizer:
            return
        meter = self._meters.get(optimizer)
        if meter is None or not meter.is_current():
            self._names = {parameter: name for name, parameter in module.named_parameters()}
            meter = self._meters[optimizer] = GradientMeter(optimizer, self._names, self._drives_clipping(module))
        plugin = self._tap.plugin
        scalars = dict(step.take_learning_rates())
        scale = scale_tensor(plugin)
        if scale is not None:
            scalars["loss_scale"] = scale
        window = self._close_window(step)
        meter.measure(scalars, None if window.loss is None else {"loss": window.loss})
        step.logger_step = logger_step(self.trainer)
        if step.meter is None and any(policy.wants_update(step.logger_step) for policy in self._policies):
            meter.remember_weights()
        step.meter = meter
        step.divide_by_scale = scale is not None and unscales_itself(optimizer)

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
        if step.found_inf is not None:
            step.meter.put("found_inf", step.found_inf)
        # The progress counters have not moved yet in automatic optimization, nor in manual: Lightning does it
        # after us.
        record = _RecordDraft(
            step=trainer.global_step,
            logger_step=step.logger_step,
            epoch=trainer.current_epoch,
            optimizer=self._index_of(step.optimizer),
            batches=step.batches,
            learning_rates=step.learning_rates,
            parameter_names=step.meter.parameter_names,
            divide_by_scale=step.divide_by_scale,
            skipped_by=None if step.called else NO_LOSS if step.batches == 0 else GRAD_SCALER,
        )
        step.meter.send(self._reads, lambda measurement: self._hand_over(record.complete(measurement)))
        self._reads.poll()

    # Parts of the above.

    def _hand_over(self, record: StepRecord) -> None:
        for policy in list(self._policies):
            policy.on_record(record)

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

    def _drives_clipping(self, module: Any) -> bool:
        plugin_class = type(self._tap.plugin)
        return bool(
            self.trainer.gradient_clip_val
            and str(self.trainer.gradient_clip_algorithm or "norm").lower().endswith("norm")
            and module.automatic_optimization
            and not is_overridden("configure_gradient_clipping", module)
            # a plugin of the user's, or of a strategy that clips in its own way
            and plugin_class.clip_grad_by_norm.__qualname__ == "Precision.clip_grad_by_norm"
            and plugin_class.main_params.__qualname__ == "Precision.main_params"
        )

    def _watch_step_call(self, optimizer: Optimizer) -> None:
        """Learn from the optimizer itself whether GradScaler lets it step, and what it is told."""
        if optimizer not in self._hooks:
            self._hooks[optimizer] = optimizer.register_step_pre_hook(self._on_step_call)

    def _on_step_call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._step is not None and self._step.optimizer is optimizer:
            self._step.called = True
            self._step.found_inf = getattr(optimizer, "found_inf", None)

    def _index_of(self, optimizer: Optimizer) -> int:
        for index, candidate in enumerate(self.trainer.optimizers):
            if candidate is optimizer:
                return index
        return 0


@dataclass(slots=True)
class _Window:
    """The backward passes since the last step."""

    loss: Tensor | None = None
    batches: int = 0
    _last_batch: int = -1

    def add(self, loss: Tensor, batch: int) -> None:
        # Lightning has divided each loss by accumulate_grad_batches: their sum is the window's mean.
        self.loss = loss if self.loss is None else self.loss + loss
        if batch != self._last_batch:  # manual optimization may go backward twice in a batch
            self.batches += 1
            self._last_batch = batch


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
    learning_rates: list[float | str]
    parameter_names: tuple[str, ...]
    divide_by_scale: bool
    skipped_by: str | None

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
            grad_norms=norms,
            loss=scalars.get("loss"),
            loss_scale=scale,
            learning_rates=rates,
            clip_coefficient=scalars.get("clip_coefficient"),
            skipped_by=GRAD_SCALER if scalars.get("found_inf") else self.skipped_by,
            weight_norms=measured.weight_norms,
            update_norms=measured.update_norms,
        )


class _PluginTap:
    """Stands in for methods of one precision plugin until it is removed."""

    _METHODS = ("pre_backward", "_clip_gradients", "clip_grad_by_norm", "optimizer_step")

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

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        self._runtime.begin_step(optimizer)
        result = self._originals["optimizer_step"](optimizer, model=model, closure=closure, **kwargs)
        self._runtime.finish_step()
        return result

    def _clip_gradients(self, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self._runtime.measure(optimizer, self._runtime.trainer.lightning_module)
        self._originals["_clip_gradients"](model, optimizer, *args, **kwargs)

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        if not self._runtime.clip_by_norm(optimizer, clip_val):
            self._originals["clip_grad_by_norm"](optimizer, clip_val)


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
