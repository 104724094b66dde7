"""Private names of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_stability.internals.overrides import Overrides


def logged_results(trainer: Any) -> Any:
    """What `self.log` accumulates in the training epoch."""
    return trainer.fit_loop.epoch_loop._results


def active_results(trainer: Any) -> Any:
    """What `self.log` accumulates in the loop that runs now."""
    return trainer._results


def logger_step(trainer: Any) -> int:
    """The step under which Lightning would log at this point of the training loop."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def batch_number(trainer: Any) -> int:
    """The batch that is being trained, counted over the whole run, from 1."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def batch_index(trainer: Any) -> int:
    """The batch that is being trained, counted in its epoch, from 0."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready) - 1


def epochs_processed(trainer: Any) -> int:
    """Epochs that have been trained to their end."""
    return int(trainer.fit_loop.epoch_progress.current.processed)


def window_is_open(trainer: Any) -> bool:
    """Whether gradients of earlier batches wait for more before the optimizer steps."""
    return bool(trainer.fit_loop._should_accumulate()) and trainer.lightning_module.automatic_optimization


def validation_is_due(trainer: Any) -> bool:
    """Whether Lightning will validate right after this batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and bool(trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))


def on_closure(overrides: Overrides, trainer: Any, listener: Callable[[Any, dict[str, Any]], None]) -> None:
    """Show a listener each batch's closure, which runs its forward and backward pass, and its arguments."""
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    original = loop._make_closure

    def make_closure(kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
        closure = original(kwargs, optimizer, batch_idx)
        listener(closure, kwargs)
        return closure

    overrides.set(loop, "_make_closure", make_closure)


def trained_before_toggle(module: Any) -> dict[int, bool]:
    """By the id of each parameter: whether it was trained before `toggle_optimizer`; empty where none is toggled."""
    return {id(parameter): trained for parameter, trained in module._param_requires_grad_state.items()}


def zero_without_hooks(closure: Any, zero_grad: Callable[[], None]) -> None:
    """Have a closure's next run zero the gradients without Lightning's hooks and counters around it.

    The closure has been run before: `on_before_zero_grad`, where some average the weights, has been called.
    """
    original = closure._zero_grad_fn
    if original is not None:  # it is the first batch of a window
        first = iter([zero_grad])
        closure._zero_grad_fn = lambda: next(first, original)()


def transferred(trainer: Any, batch: Any) -> Any:
    """A batch as Lightning casts it for the current precision and moves it to the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def on_failure_in_processes(trainer: Any, listener: Callable[[BaseException], None]) -> None:
    """Tell of an exception in processes that Lightning forks or spawns: their callbacks hear nothing of it."""
    if not any(cls.__name__ == "_MultiProcessingLauncher" for cls in type(trainer.strategy.launcher).__mro__):
        return
    overrides = Overrides()
    run_stage = trainer._run_stage

    def watched() -> Any:
        overrides.restore()
        try:
            return run_stage()
        except BaseException as exception:
            listener(exception)
            raise

    overrides.set(trainer, "_run_stage", watched)
