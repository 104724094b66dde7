"""Each optimizer step from its first backward pass to its record, in the order in which the plugin calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stability._compat import MisconfigurationException, is_overridden
from lightning_stability.health import GradientMeter
from lightning_stability.health.loss_scale import forgive_, scale_tensor, unscales_itself
from lightning_stability.recovery import Guard
from lightning_stability.runtime.steps import GRAD_SCALER, NO_LOSS, OpenStep, RecordDraft, Window
from lightning_stability.runtime.taps import Gate, Once, StepStandIn, UpdateNotWanted, has_a_step_of_its_own
from lightning_stability.runtime.trainers import clips_by_norm, is_clipped_to_the_bit, logger_step

if TYPE_CHECKING:
    from lightning_stability.runtime.runtime import Runtime

_UPDATES_TO_WATCH = 2
"""Updates of an optimizer of the user's own before which to look whether it moves the weights ahead of its closure. The
second may move them by what the first has made, such as a momentum."""


class Stepping:
    """Measures each step's gradients, has the guard judge them, and lets the optimizer go ahead or not.

    Args:
        runtime: Whose Trainer steps.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.meters: dict[Optimizer, GradientMeter] = {}
        self.window = Window()
        self._last_window = Window()
        self._step: OpenStep | None = None
        self._stand_ins: dict[Optimizer, StepStandIn] = {}
        self._seen_through: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()

    def stand_in_for(self, optimizer: Optimizer) -> None:
        """Be asked when this optimizer steps, from now on."""
        if optimizer not in self._stand_ins:
            self._stand_ins[optimizer] = StepStandIn(optimizer, self)

    def remove(self) -> None:
        """Give the optimizers back as they were."""
        for stand_in in self._stand_ins.values():
            stand_in.remove()
        self._stand_ins.clear()

    def note_loss(self, loss: Tensor) -> None:
        """A backward pass is about to run from this loss: it is one of the window's.

        Args:
            loss: With its graph.
        """
        trainer = self._runtime.trainer
        loss = loss.detach()
        if loss.dim():
            loss = loss.sum()
        elif not trainer.lightning_module.automatic_optimization:
            loss = loss.clone()  # it is the user's tensor; in automatic optimization Lightning just made it
        progress = trainer.fit_loop.epoch_loop.batch_progress
        self.window.add(loss, progress.total.ready, progress.current.ready - 1)

    def forget_window(self) -> None:
        """The backward passes since the last step do not count: they are going to be run again."""
        self.window = Window()

    def begin_step(self, optimizer: Optimizer) -> None:
        """An optimizer step starts; its closure, if it has one, has not run yet."""
        self._step = None
        if self._runtime.is_ours() and self._runtime.reads_steps():
            self._step = OpenStep(optimizer)
            self.stand_in_for(optimizer)

    def measure(self, optimizer: Optimizer, module: Any) -> None:
        """The gradients are final but for clipping."""
        step = self._step
        if step is None or step.optimizer is not optimizer:
            return
        meter = self.meters.get(optimizer)
        if meter is None or not meter.is_current():
            names = {parameter: name for name, parameter in module.named_parameters()}
            self._runtime.outcomes.rename(names, changed=meter is not None)
            meter = GradientMeter(optimizer, names, self._drives_clipping(optimizer))
            self.meters[optimizer] = meter
        plugin = self._runtime.plugin
        scalars = dict(step.take_learning_rates())
        scale = scale_tensor(plugin)
        if scale is not None:
            scalars["loss_scale"] = scale
        window = self._close_window(step)
        kept = {} if window.loss is None else {"loss": window.loss}
        if self._runtime.guard is not None and window.batches > 1:
            kept["bad_batch"] = window.first_bad()
        meter.measure(scalars, kept)
        step.scalar_names = tuple(scalars)
        step.logger_step = logger_step(self._runtime.trainer)
        if step.meter is None and self._runtime.wants_update(step.logger_step):
            meter.remember_weights()
        step.meter = meter
        step.divide_by_scale = scale is not None and unscales_itself(optimizer)
        if self._runtime.guard is not None:
            scaled_by = scale if step.divide_by_scale else None
            total_norm, largest_norm = meter.total_norm(), meter.largest_norm
            step.verdict = self._runtime.guard.judge(optimizer, total_norm, largest_norm, scaled_by, window.loss)
            self._forgive(step)

    def after_clipping(self, optimizer: Optimizer, module: Any) -> None:
        """A module that clips in its own way may have spoilt its gradients: look at them once more."""
        step = self._step
        if step is None or step.meter is None or step.verdict is None or step.optimizer is not optimizer:
            return
        if is_overridden("configure_gradient_clipping", module):
            assert self._runtime.guard is not None
            self._runtime.guard.judge_again(step.verdict, step.meter.total_norm_now())

    def update(self, optimizer: Optimizer, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The optimizer is called: let it, unless the step is bad.

        Args:
            optimizer: The bare torch optimizer.
            original: Its own `step`.
            args: What it was called with.
            kwargs: What it was called with.
        """
        if not self._runtime.is_ours():
            return original(*args, **kwargs)
        if self._runtime.guard is None:
            if self._step is not None and self._step.optimizer is optimizer:
                self._step.called = True
                self._step.found_inf = getattr(optimizer, "found_inf", None)
            return original(*args, **kwargs)
        lightning_does_not_know = self._step is None
        if lightning_does_not_know:  # `optimizers(use_pl_optimizer=False)`
            self.begin_step(optimizer)
        result = self._guarded_update(self._runtime.guard, optimizer, original, args, kwargs)
        if lightning_does_not_know:
            self.finish_step()
        return result

    def _guarded_update(
        self, guard: Guard, optimizer: Optimizer, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        arguments = {**dict(zip(("closure",), args, strict=False)), **kwargs}
        closure, result = arguments.get("closure"), None
        if closure is not None and has_a_step_of_its_own(optimizer):
            return self._guarded_within(guard, optimizer, original, arguments)
        once: Once | None = None
        if closure is not None:
            # The closure makes the gradients, so it has to run before anything can be said of them.
            with torch.enable_grad():
                result = closure()
            once = arguments["closure"] = Once(result, closure, optimizer)
        step = self._step
        assert step is not None
        if step.meter is None:
            self.measure(optimizer, self._runtime.trainer.lightning_module)
        if step.verdict is None:  # a second optimizer inside of the first one's step
            return original(**arguments)
        step.called = True
        self._forgive(step)
        with guard.decide(optimizer, step.verdict) as goes_ahead:
            if goes_ahead:
                result = original(**arguments)
        if goes_ahead and once is not None and self._runtime.trainer.lightning_module.automatic_optimization:
            once.check()
        step.found_inf = step.verdict.found_inf
        guard.after_step()
        return result

    def _guarded_within(
        self, guard: Guard, optimizer: Optimizer, original: Callable[..., Any], arguments: dict[str, Any]
    ) -> Any:
        """The same where the optimizer's `step` shall run the closure itself: it may have begun something before."""
        runtime = self._runtime
        seen_through = self._seen_through.get(optimizer, 0)
        versions = _versions(optimizer) if seen_through < _UPDATES_TO_WATCH else None

        def look() -> None:
            if versions is not None and versions != _versions(optimizer):
                runtime.refuse_to_guard(
                    MisconfigurationException(
                        f"{type(optimizer).__name__}.step moves the weights before it calls its closure, and an update"
                        " that is skipped there would leave them moved"
                    )
                )

        def decide() -> bool:
            step = self._step
            if step is None or runtime.guard is not guard:
                return True
            if step.meter is None:
                self.measure(optimizer, runtime.trainer.lightning_module)
            if step.verdict is None:
                return True
            step.called = True
            self._forgive(step)
            goes_ahead = decision.enter_context(guard.decide(optimizer, step.verdict))
            if goes_ahead and versions is not None:
                self._seen_through[optimizer] = seen_through + 1
            return goes_ahead

        with ExitStack() as decision:
            gate = arguments["closure"] = Gate(arguments["closure"], optimizer, look, decide)
            try:
                result = original(**arguments)
            except UpdateNotWanted as stopped:
                if stopped.gate is not gate:
                    raise
                result = gate.result
        step = self._step
        if step is not None and runtime.guard is not guard:
            step.called = True
        elif step is not None and step.called and step.verdict is not None:
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
        if self._runtime.guard is not None:
            self._runtime.guard.end_step(step.optimizer)
        trainer = self._runtime.trainer
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
        self._runtime.send(step.meter, record, scaled="loss_scale" in step.scalar_names)

    # Parts of the above.

    def _close_window(self, step: OpenStep) -> Window:
        """The backward passes that this step's gradients come from."""
        if step.meter is None:
            if self.window.batches:
                self._last_window, self.window = self.window, Window()
            elif self._runtime.trainer.lightning_module.automatic_optimization:
                self._last_window = Window()
            # else: a second optimizer stepping on the same backward pass
            step.batches = self._last_window.batches
        return self._last_window

    def _drives_clipping(self, optimizer: Optimizer) -> bool:
        """Whether Lightning's clipping shall take the norms of the meter."""
        runtime = self._runtime
        return (is_clipped_to_the_bit(optimizer) or not runtime.is_automatic()) and clips_by_norm(runtime.trainer)

    def _forgive(self, step: OpenStep) -> None:
        """GradScaler shall not halve its scale for an input that has been rejected.

        Called after it has looked: it does so in `unscale_`, or, for optimizers that unscale themselves, in its `step`.
        """
        if step.verdict is not None and step.verdict.rejected is not None:
            forgive_(self._runtime.plugin, step.optimizer, step.verdict.rejected)

    def _index_of(self, optimizer: Optimizer) -> int:
        for index, candidate in enumerate(self._runtime.trainer.optimizers):
            if candidate is optimizer:
                return index
        return 0


def _versions(optimizer: Optimizer) -> list[int]:
    return [parameter._version for group in optimizer.param_groups for parameter in group["params"]]
