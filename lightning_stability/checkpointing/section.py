"""What an exact resume needs beside Lightning's own, and the checkpoint of a run that is ended with a batch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_stability import internals
from lightning_stability.checkpointing import writing
from lightning_stability.checkpointing.loops import SavePoint, SavePoints
from lightning_stability.checkpointing.own_objects import without_objects
from lightning_stability.checkpointing.resume import FORMAT, SECTION, was_stopped_early
from lightning_stability.health.late_reads import begin_read


def make_section(trainer: Any, point: SavePoint, epochs: float, stop_is_due: bool) -> dict[str, Any]:
    """Return what goes into a checkpoint under `SECTION`. All ranks have to ask.

    Args:
        epochs: Epochs trained, for the listing.
        stop_is_due: Whether the run stops as soon as `min_epochs` and `min_steps` let it.
    """
    points = SavePoints.of(trainer)
    return {
        "format": FORMAT,
        "run_id": points.run_id,
        "start": points.starts,
        "inside_epoch": point.batches > 0,
        "more_batches": points.has_more_batches(point),
        "batch_is_over": point.over,
        "epochs": epochs,
        "saved_at": time.time(),
        "finite": True,
        "nonfinite_by_design": [],
        "nonfinite_before": points.finite.state_dict(),
        "reloaded_in_epoch": _reloaded_in_epoch(trainer),
        "stop_is_due": stop_is_due,
        "stopped_early": point.ending and was_stopped_early(trainer),
        "metrics": _scalars(trainer.callback_metrics),
        "ranks": _gather(trainer, points.capture(point)),
    }


class StopCheckpoint:
    """The checkpoint of a run that is ended with a batch: from there it continues as if it had not been.

    Until it is written this costs nothing. The order of an epoch that a sampler without a state drew is known only if
    FractionalCheckpoint is there, too, and so is a batch that was read ahead in data of unknown length.

    Args:
        trainer: A Trainer of either namespace, in `on_train_start`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        SavePoints.of(trainer).begin()

    def write(self, path: str, stop_is_due: bool) -> list[str]:
        """Write it, unless something in it is not finite. Called on all ranks, where the batch's hooks are through.

        An older file of that name stays until this one is complete. Hyperparameters that only `weights_only=False`
        loads are left out: the command line of Lightning could not resume from them.

        Args:
            path: On whatever file system.
            stop_is_due: As in `make_section`.

        Returns:
            The names of what is not finite; empty if it is written.

        Raises:
            OSError: On all ranks, if the first could not write it.
        """
        trainer, points = self._trainer, SavePoints.of(self._trainer)
        point, section = points.at_end_of_batch(), None
        if point is not None:
            # before `on_save_checkpoint`, which may draw random numbers: a run that went on would not have called it
            batches = trainer.num_training_batches
            epochs = point.epoch if batches == float("inf") else point.epochs(batches)
            section = make_section(trainer, point, float(epochs), stop_is_due)
        checkpoint = internals.dump_checkpoint(trainer, weights_only=False)
        if bad := nonfinite_on_any_rank(trainer, checkpoint, section):
            return bad
        if point is not None:
            points.leave_the_end_of_batch(checkpoint, point)
            checkpoint[SECTION] = section
        with contextlib.suppress(Exception):  # what cannot be pickled fails below, with a better message
            without_objects(checkpoint)
        write_at_once(trainer, checkpoint, path)
        return []


def write_at_once(trainer: Any, checkpoint: dict[str, Any], path: str) -> None:
    """Write a checkpoint; called on all ranks. An older one of that name stays until the new one is complete.

    Raises:
        OSError: On the other ranks, if the first could not write it; there it is whatever was raised.
    """
    if not internals.writes_one_file(trainer):
        _write_their_way(trainer, checkpoint, path)
        return
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            writing.write_file(checkpoint, path)
        except Exception as raised:  # the other ranks wait to hear of it
            error = raised
    failure: str | None = trainer.strategy.broadcast(None if error is None else f"on the first rank: {error!r}")
    if error is not None:
        raise error
    if failure is not None:
        raise OSError(failure)


def _write_their_way(trainer: Any, checkpoint: dict[str, Any], path: str) -> None:
    """All ranks write, or a plugin of the user's does."""
    older, kept = Path(path), Path(path).with_suffix(".previous.ckpt")
    moved = trainer.is_global_zero and writing.is_local(path) and older.exists()
    if moved:
        older.replace(kept)
    trainer.strategy.barrier("StopCheckpoint begins")
    try:
        trainer.strategy.save_checkpoint(checkpoint, path)
    except BaseException:
        if moved and not older.exists():
            kept.replace(older)
        raise
    trainer.strategy.barrier("StopCheckpoint")
    if moved and older.exists():
        writing.delete(str(kept))


def nonfinite_on_any_rank(trainer: Any, checkpoint: dict[str, Any], section: dict[str, Any] | None) -> list[str]:
    """The names of what became non-finite, on whichever rank holds it; the same verdict on all.

    Args:
        checkpoint: This rank's.
        section: Is told what is not finite by design.
    """
    return look_on_all_ranks(trainer, checkpoint, section)()


def look_on_all_ranks(
    trainer: Any, checkpoint: dict[str, Any], section: dict[str, Any] | None
) -> Callable[[], list[str]]:
    """The same without waiting for the device: all ranks call it, then what it returns, which waits."""
    hidden = {} if section is None else section["ranks"][trainer.global_rank]["buffers"]
    look, sort_out = SavePoints.of(trainer).finite.begin(checkpoint, hidden)
    count = look.count(trainer.strategy.root_device)
    on_all = begin_read(count if trainer.world_size == 1 else trainer.strategy.reduce(count, reduce_op="sum"))

    def verdict() -> list[str]:
        names, by_design = sort_out()
        if section is not None:
            section["nonfinite_by_design"] = by_design
        if not on_all() or trainer.strategy.reduce_boolean_decision(not names, all=True):
            return []
        return names or ["what another rank holds"]

    return verdict


def is_of_a_stop(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was written by `StopCheckpoint`."""
    section = checkpoint.get(SECTION)
    return isinstance(section, dict) and not section.get("batch_is_over", True)


def _gather(trainer: Any, state: dict[str, Any]) -> list[dict[str, Any]]:
    if trainer.world_size == 1:
        return [state]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, _on_host(state))
    return states


def _on_host(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: _on_host(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_on_host(value) for value in state]
    return state


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if torch.as_tensor(value).numel() == 1}


def _reloaded_in_epoch(trainer: Any) -> int | None:
    """The epoch in which the loaders were made, where `reload_dataloaders_every_n_epochs` makes new ones."""
    return int(internals.epoch_of_loaders(trainer)) if trainer.reload_dataloaders_every_n_epochs else None
