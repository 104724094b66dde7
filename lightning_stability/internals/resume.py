"""Private names of checkpoints, loop progress and data loaders."""

from __future__ import annotations

from typing import Any

from torch.utils.data.dataloader import _BaseDataLoaderIter

LoaderIterator = _BaseDataLoaderIter
"""What iterating over a DataLoader gives; torchdata's StatefulDataLoader derives from it too."""

NEXT_INDEX = "_next_index"
"""Its method that asks the sampler for the indices of a batch."""


def sampler_iterator(iterator: Any) -> Any:
    """The sampler's iterator that a loader's iterator asks; another one for each epoch."""
    return iterator._sampler_iter


def set_sampler_iterator(iterator: Any, order: Any) -> None:
    """Have a loader's iterator ask another one for the indices of its batches."""
    iterator._sampler_iter = order


BEGIN_ANEW = "_reset"
"""The method by which a loader's iterator begins again; with workers it is called for the first time, too."""

LOADERS_ARE_MADE = "_load_combined_loader_states"
"""The fit loop's method that is called when there are new training loaders, before they are iterated over."""


def index_sampler(loader: Any) -> Any:
    """What a loader's iterator asks for indices: the batch sampler, or the sampler if there are no batches."""
    return loader._index_sampler


def batches_delivered(iterator: Any) -> int:
    """How many batches a loader's iterator has yielded since it began."""
    return int(iterator._num_yielded)


def base_seed(iterator: Any) -> int:
    """What the seeds of a loader's workers are made from."""
    return int(iterator._base_seed)


def set_base_seed(iterator: Any, seed: int) -> None:
    """Restore what `base_seed` returned, before the workers are started."""
    iterator._base_seed = seed


def turn_workers(iterator: Any, batches: int) -> None:
    """Have the next batch made by the worker whose turn it would be after so many more batches."""
    for _ in range(batches % iterator._num_workers):
        next(iterator._worker_queue_idx_cycle)


def wrapped_sampler(sampler: Any) -> Any:
    """The sampler whose order Lightning's DistributedSamplerWrapper deals out."""
    return sampler.dataset._sampler


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


def limits(trainer: Any) -> list[float]:
    """How many batches of each training loader make an epoch at most."""
    found = combined_loader(trainer).limits
    return [float("inf")] * len(combined_loader(trainer).flattened) if found is None else list(found)


def ends_with_shortest(trainer: Any) -> bool:
    """Whether an epoch ends with the first training loader that is through."""
    return bool(combined_loader(trainer)._mode == "min_size")


def batches_of_epoch(trainer: Any) -> int:
    """How many batches of the epoch under way have been fetched and trained."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def set_batches_of_epoch(trainer: Any, batches: int) -> None:
    """Have the epoch under way be so many batches in."""
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    current.ready = current.started = current.processed = current.completed = batches


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
