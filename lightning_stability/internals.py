"""Every private name of Lightning and torch that the package uses, once each.

`tests/test_internals.py` has a test for each of them, which fails when a new version moves it. Public names are used
where they are needed.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torchmetrics import Metric

_ABSENT = object()


class Overrides:
    """Attributes that are set on instances for a while; `restore` undoes them, the last one first.

    What somebody else has set over one of ours in the meantime is left as it is.

    Example:
        >>> class Loop:
        ...     def advance(self):
        ...         return "its own"
        >>> loop, overrides = Loop(), Overrides()
        >>> overrides.set(loop, "advance", lambda: "ours")
        >>> loop.advance()
        'ours'
        >>> overrides.restore()
        >>> loop.advance()
        'its own'
    """

    def __init__(self) -> None:
        self._stack: list[tuple[Any, str, Any, Any]] = []

    def set(self, instance: Any, name: str, value: Any) -> None:
        """Set an attribute of one instance; its class is left alone. A function is set as an `_Override`."""
        before = vars(instance).get(name, _ABSENT)
        if callable(value) and not isinstance(value, types.MethodType) and not isinstance(instance, type):
            value = _Override(instance, name, value)
        setattr(instance, name, value)
        self._stack.append((instance, name, value, before))

    def restore(self) -> None:
        """Undo everything that was set."""
        while self._stack:
            instance, name, value, before = self._stack.pop()
            if vars(instance).get(name, _ABSENT) is not value:
                continue
            if before is _ABSENT:
                delattr(instance, name)
            else:
                setattr(instance, name, before)


class _Override:
    """A function set on an instance; a copy of the instance, pickled or deep, gets its class's own method."""

    def __init__(self, instance: Any, name: str, function: Callable[..., Any]) -> None:
        self._instance = instance
        self._name = name
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # (the instance is known to the pickler by now, and has no state yet: its class answers)
        return getattr, (self._instance, self._name)


# --- The training loop ---


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


# --- Precision plugins and optimizers ---

PLUGIN_METHODS = (
    "convert_input",
    "pre_backward",
    "post_backward",
    "_clip_gradients",
    "clip_gradients",
    "clip_grad_by_norm",
    "optimizer_step",
)
"""The methods of a precision plugin through which a training step goes."""


def input_dtype(plugin: Any) -> torch.dtype | None:
    """What a precision plugin casts batches to; None where it leaves them as they are."""
    dtype: torch.dtype | None = getattr(plugin, "_desired_input_dtype", None)
    return dtype


def scaler_state(plugin: Any) -> list[torch.Tensor]:
    """Copies of GradScaler's scale and of its count of good steps, on the device; empty without one."""
    scaler = getattr(plugin, "scaler", None)
    tensors = () if scaler is None else (scaler._scale, scaler._growth_tracker)
    return [tensor.clone() for tensor in tensors if tensor is not None]


def set_scaler_state(plugin: Any, state: list[torch.Tensor]) -> None:
    """Restore what `scaler_state` has copied."""
    if state:
        plugin.scaler._scale.copy_(state[0])
        plugin.scaler._growth_tracker.copy_(state[1])


def default_store() -> Any:
    """The key-value store that the processes of a distributed run share."""
    return torch.distributed.distributed_c10d._get_default_store()


def loss_scale(scaler: Any) -> Any:
    """GradScaler's scale as the device tensor that it updates in place; None before it scaled its first loss.

    `GradScaler.get_scale()` is the public way, but it waits for the device.
    """
    return scaler._scale


def found_inf_tensors(scaler: Any, optimizer: Any) -> list[Any]:
    """What `GradScaler.unscale_` found in this optimizer's gradients, one tensor per device; none before it looked."""
    return list(scaler._per_optimizer_states.get(id(optimizer), {}).get("found_inf_per_device", {}).values())


def unscales_itself(optimizer: Any) -> bool:
    """Whether the optimizer divides the scale out inside its step, so that gradients carry it until then.

    True for the fused ones and for any optimizer that declares the same to GradScaler.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def is_flattened(parameter: Any) -> bool:
    """Whether FSDP1 holds the parameter: as one flat shard of several, or as this rank's piece of it."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def foreach_norms(tensors: list[Tensor], dtype: torch.dtype | None) -> Sequence[Tensor]:
    """The L2 norm of each tensor, by few kernels; accumulated and returned in `dtype`.

    Raises TypeError, AttributeError or NotImplementedError where one is None or sparse.
    """
    return torch._foreach_norm(tensors, 2, dtype)


def foreach_scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply each tensor in place."""
    torch._foreach_mul_(tensors, factor)


def foreach_subtract_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Subtract from each tensor another one, in place."""
    torch._foreach_sub_(tensors, others)


def foreach_copies(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each tensor."""
    return list(torch._foreach_add(tensors, 0))


# --- Loggers ---


def logger_prefix(logger: Any) -> str:
    """What a logger puts in front of each key; its `log_metrics` does, and who goes past it has to."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


# --- Checkpoints, loop progress and data loaders ---

LoaderIterator = _BaseDataLoaderIter
"""What iterating over a DataLoader gives; torchdata's StatefulDataLoader derives from it too."""

NEXT_INDEX = "_next_index"
"""Its method that asks the sampler for the indices of a batch."""


def sampler_iterator(iterator: Any) -> Any:
    """The sampler's iterator that a loader's iterator asks; another one for each epoch."""
    return iterator._sampler_iter


def collates_by(iterator: Any) -> Any:
    """The function by which a loader's iterator makes a batch of samples."""
    return iterator._collate_fn


def delivers_in_order(iterator: Any) -> bool:
    """Whether a loader's iterator yields batches in the order in which the sampler gave them."""
    return getattr(iterator, "_in_order", True)


def combined_loader(trainer: Any) -> Any:
    """What combines the training loaders; None before they are made."""
    return trainer.fit_loop._combined_loader


def validation_loader(trainer: Any) -> Any:
    """What combines the loaders of the validation inside of `fit`; None before they are made."""
    return trainer.fit_loop.epoch_loop.val_loop._combined_loader


def data_fetcher(trainer: Any) -> Any:
    """What fetches training batches from the combined loader."""
    return trainer.fit_loop._data_fetcher


def loader_states(trainer: Any) -> list[Any]:
    """The states of those training loaders that have one."""
    states: list[Any] = combined_loader(trainer)._state_dicts()
    return states


def load_loader_states(trainer: Any, states: list[Any]) -> None:
    """Restore what `loader_states` returned; the loaders take effect when they are next iterated over."""
    combined_loader(trainer)._load_state_dicts(states)


def iterators(combined: Any) -> list[Any]:
    """The iterators of a combined loader's loaders; none before the first epoch."""
    mode = combined._iterator
    return [] if mode is None else list(mode.iterators)


def consumed(trainer: Any) -> list[bool] | None:
    """Which of several training loaders have been through, where the mode keeps count of it."""
    found = getattr(combined_loader(trainer)._iterator, "_consumed", None)
    return None if found is None else list(found)


def set_consumed(trainer: Any, consumed: list[bool]) -> None:
    """Restore what `consumed` returned."""
    combined_loader(trainer)._iterator._consumed = list(consumed)


def fetch_ahead(fetcher: Any) -> None:
    """Have a prefetching fetcher read one batch, as it does when it is iterated over."""
    fetcher.batches.append(super(type(fetcher), fetcher).__next__())  # type: ignore[misc]


def loaders_are_due(trainer: Any) -> bool:
    """Whether `reload_dataloaders_every_n_epochs` makes new training loaders now."""
    return bool(trainer.fit_loop._should_reload_train_dl)


def epoch_of_loaders(trainer: Any) -> float:
    """The epoch in which the training loaders were made."""
    return float(trainer.fit_loop._last_train_dl_reload_epoch)


def load_loaders_of_epoch(trainer: Any, epoch: int) -> None:
    """Have the module or data module make the training loaders as in that epoch."""
    fit = trainer.fit_loop
    if fit._last_train_dl_reload_epoch == epoch:
        return
    fit._last_train_dl_reload_epoch = epoch
    if fit._should_reload_train_dl:
        return  # new ones are due in any case
    progress = fit.epoch_progress.current
    now, progress.completed = progress.completed, epoch
    fit._combined_loader = None
    fit.setup_data()
    progress.completed = now


def set_sampler_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader's samplers the epoch, as Lightning does before each."""
    from lightning_fabric.utilities.data import _set_sampler_epoch

    _set_sampler_epoch(loader, epoch)


def epoch_is_over(trainer: Any) -> bool:
    """Whether all batches of the epoch have been fetched."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def window_is_incomplete(trainer: Any) -> bool:
    """Whether accumulated gradients wait for more batches."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def can_stop_early(trainer: Any) -> bool:
    """Whether `min_epochs` and `min_steps` are met."""
    return bool(trainer.fit_loop._can_stop_early)


def load_loop_progress(trainer: Any, loops: dict[str, Any], inside_epoch: bool) -> None:
    """Load the fit loop's progress so that it continues right there, without what Lightning does on a restart."""
    fit = trainer.fit_loop
    fit.load_state_dict(loops)
    fit.update_restart_stage()  # inside an epoch: the hooks of its start are not called again
    _not_restarting(fit)
    fit.epoch_loop.reset_restart_stage()
    if not inside_epoch:
        fit.reset_restart_stage()
        fit._resuming_from_checkpoint = False  # so that Lightning iterates over the loaders for a new epoch


def _not_restarting(loop: Any) -> None:
    loop._restarting = False
    for inner in vars(loop).values():
        if hasattr(inner, "_restarting"):
            _not_restarting(inner)


def run_to_the_end(trainer: Any, inside_epoch: bool, restore: Any) -> None:
    """Do what `FitLoop.run` does around its last epoch, for a run in which no batch is left to train.

    Args:
        trainer: A Trainer, where `fit_loop.run` would be called.
        inside_epoch: Whether the end of the epoch under way is still to come.
        restore: Called between two epochs where the run continues.
    """
    fit = trainer.fit_loop
    fit.reset()
    fit.on_run_start()
    if inside_epoch:
        try:
            fit.on_advance_start()
            fit.advance()
            fit.on_advance_end()
        except StopIteration:
            pass
        finally:
            fit.on_iteration_done()
    else:
        restore()
    fit.done  # noqa: B018 - it sets the number of epochs, and says why training ends
    fit._restarting = False
    fit.on_run_end()


def prepare_end_of_averaging(trainer: Any, averaging: Any) -> None:
    """Have a StochasticWeightAveraging find in `on_train_end` what its last epoch sets, where that is not trained."""
    if averaging._model_contains_batch_norm and not hasattr(averaging, "_accumulate_grad_batches"):
        averaging._accumulate_grad_batches = trainer.accumulate_grad_batches
        trainer.fit_loop.max_batches += 1


def dump_checkpoint(trainer: Any, weights_only: bool) -> dict[str, Any]:
    """Lightning's own checkpoint of now; calls everybody's `on_save_checkpoint`."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only)
    return checkpoint


def writes_one_file(trainer: Any) -> bool:
    """Whether the first rank writes all there is with `torch.save`, so that it can be done in its place."""
    strategy = trainer.strategy
    return (
        type(strategy).save_checkpoint.__qualname__ == "Strategy.save_checkpoint"
        and type(strategy.checkpoint_io).__name__ == "TorchCheckpointIO"
    )


def non_persistent_buffers(module: Any) -> dict[str, Any]:
    """The buffers of one module, without its children's, that its `state_dict` leaves out."""
    names = sorted(module._non_persistent_buffers_set)
    return {name: module._buffers[name] for name in names if module._buffers.get(name) is not None}


METRIC_STATE = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics", "_first_loop_iter", "_current_fx")


def logger_connector(trainer: Any) -> Any:
    """What holds the logged metrics, in attributes of the names in `METRIC_STATE`."""
    return trainer._logger_connector


def training_results(trainer: Any) -> Any:
    """What `self.log` accumulates in the epoch under way."""
    return trainer.fit_loop.epoch_loop._results


def last_saved(checkpoint_callback: Any) -> str:
    """What a ModelCheckpoint wrote last."""
    return str(checkpoint_callback._last_checkpoint_saved)


# --- Modules, metrics and tensors ---


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """What dicts, lists, tuples and named tuples hold, each with its path, such as `['eeg'][0].x`.

    Of other classes, those that derive from dict or list too, the objects themselves.
    """
    leaves, _ = _pytree.tree_flatten_with_path(tree)
    return [(_pytree.keystr(path), leaf) for path, leaf in leaves]


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same nesting, with the function applied to what `leaves_with_paths` finds."""
    return _pytree.tree_map(function, tree)


def within_compiled(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile(module)` was given; None of any other module."""
    compiled = isinstance(module, torch._dynamo.OptimizedModule)  # type: ignore[attr-defined]
    return module._orig_mod if compiled else None  # type: ignore[return-value]


def compiles_its_call(module: nn.Module) -> bool:
    """Whether calling a module runs a graph that hooks on it would be compiled into.

    `module.compile()` makes it so, and Lightning's own mark on a module whose steps are compiled as a whole.
    """
    return module._compiled_call_impl is not None or getattr(module, "_compiler_ctx", None) is not None


def has_own_parameters(module: nn.Module) -> bool:
    """Whether a module holds parameters itself, beside those of its children."""
    return any(weight is not None for weight in module._parameters.values())


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """A module's own buffers by name, as it holds them; of a scripted module (which writes in place only) a copy."""
    held = module._buffers
    return held if isinstance(held, dict) else dict(held.items())


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters by name, as it holds them."""
    return module._parameters


def children_of(module: nn.Module) -> dict[str, Any]:
    """A module's own submodules by name, as it holds them; of a scripted module a copy."""
    held = module._modules
    return held if isinstance(held, dict) else dict(held.items())


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written in place; writes through `.data` are not counted."""
    return tensor._version


def has_own_dispatch(tensor: Tensor) -> bool:
    """Whether operations on a tensor run code of its class, as those of a DTensor or a jagged tensor do."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each tensor, by a few launches for all of them."""
    torch._foreach_copy_(targets, sources)  # type: ignore[arg-type]


def norm_of_each(tensors: Sequence[Tensor], order: float, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The norm of each tensor, by a few launches for all of them.

    Args:
        tensors: Of one device and dtype.
        order: 2 for the Euclidean norm.
        dtype: What it is summed up in; None for the tensors' own.
    """
    return list(torch._foreach_norm(list(tensors), order, dtype=dtype))  # type: ignore[no-untyped-call]


def metric_defaults(metric: Metric) -> dict[str, Any]:
    """What the states of a metric are after `reset`, by name; may be written."""
    return metric._defaults


def set_update_count(metric: Metric, count: int) -> None:
    """Make a metric take itself for one that was updated so often, and compute anew when it is next asked."""
    metric._update_count = count
    metric._computed = None


def newest_value(metric: Metric) -> Any:
    """What a metric was in the newest batch, which `self.log(on_step=True)` logs."""
    return metric._forward_cache


def set_newest_value(metric: Metric, value: Any) -> None:
    """The reverse of `newest_value`."""
    metric._forward_cache = value


def is_logged_tensor(item: Any) -> bool:
    """Whether an item of `self.log`'s results accumulates a tensor; else its `value` is a torchmetrics Metric."""
    return bool(item.is_tensor)


def logged_in(item: Any) -> str:
    """The hook that an item of `self.log`'s results is logged in."""
    return str(item.meta.fx)


def is_logged_by_epoch(item: Any) -> bool:
    """Whether an item of `self.log`'s results is reduced over the epoch."""
    return bool(item.meta.on_epoch)


def is_unlogged(item: Any) -> bool:
    """Whether an item of `self.log`'s results has not been logged since the last epoch's end."""
    return bool(item.has_reset)


def mark_unlogged(item: Any) -> None:
    """Leave an item of `self.log`'s results out of all metrics until it is logged again."""
    item.has_reset = True


def casts_inputs(plugin: Any) -> bool:
    """Whether a precision plugin casts batches to its own dtype."""
    return hasattr(plugin, "_desired_input_dtype")


def names_dtype(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a LightningModule or a metric says that this is its dtype."""
    return vars(module).get("_dtype") is dtype


def set_named_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Make a LightningModule or a metric say that this is its dtype; its tensors stay as they are."""
    module._dtype = dtype  # type: ignore[assignment]


# --- Autograd and dispatch, for diagnosis ---
