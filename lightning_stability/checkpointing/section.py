"""What an exact resume needs beside Lightning's own, and the checkpoint of a run that is ended with a batch."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from lightning_stability.checkpointing.listing import NonfiniteByDesign, checked_tensors
from lightning_stability.checkpointing.loops import FORMAT, SECTION, Place, TrainingPlaces


def make_section(
    trainer: Any, place: Place, epochs: float, stop_is_due: bool, nonfinite_by_design: list[str]
) -> dict[str, Any]:
    """Return what goes into a checkpoint under `SECTION`. All ranks have to ask.

    Args:
        trainer: A Trainer of either namespace.
        place: Where the run is.
        epochs: Epochs trained, for the listing.
        stop_is_due: Whether the run stops as soon as `min_epochs` and `min_steps` let it.
        nonfinite_by_design: Buffers that need not be finite. All else must have been looked at.
    """
    places = TrainingPlaces.of(trainer)
    return {
        "format": FORMAT,
        "inside_epoch": place.batches > 0,
        "more_batches": places.has_more_batches(place),
        "batch_is_over": place.over,
        "epochs": epochs,
        "saved_at": time.time(),
        "finite": True,
        "nonfinite_by_design": nonfinite_by_design,
        "reloaded_in_epoch": places.reloaded_in_epoch,
        "stop_is_due": stop_is_due,
        "metrics": _scalars(trainer.callback_metrics),
        "ranks": _gather(trainer, places.capture(place)),
    }


class StopCheckpoint:
    """The checkpoint of a run that is ended with a batch: from there it goes on as if it had not been.

    Until it is written this costs nothing. The order of an epoch that a sampler without a state drew is known only if
    FractionalCheckpoint is there, too, and so is a batch that was read ahead in data of unknown length.

    Args:
        trainer: A Trainer of either namespace, in `on_train_start`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        TrainingPlaces.of(trainer).begin()
        self._by_design = NonfiniteByDesign(trainer.lightning_module.named_buffers())

    def write(self, path: str, stop_is_due: bool) -> list[str]:
        """Write it, unless something in it is not finite. Called on all ranks, where the batch's hooks are through.

        Args:
            path: On whatever file system.
            stop_is_due: As in `make_section`.

        Returns:
            The names of what is not finite; empty if it is written.
        """
        trainer, places = self._trainer, TrainingPlaces.of(self._trainer)
        place, section = places.at_end_of_batch(), None
        if place is not None:
            # before `on_save_checkpoint`, which may draw random numbers: a run that went on would not have called it
            batches = trainer.num_training_batches
            epochs = place.epoch if batches == float("inf") else place.epochs(batches)
            section = make_section(trainer, place, float(epochs), stop_is_due, self._by_design.names)
        checkpoint = dump_checkpoint(trainer, weights_only=False)
        if bad := nonfinite_on_any_rank(trainer, checkpoint, self._by_design):
            return bad
        if place is not None:
            places.leave_the_end_of_batch(checkpoint, place)
            checkpoint[SECTION] = section
        trainer.strategy.save_checkpoint(checkpoint, path)
        trainer.strategy.barrier("StopCheckpoint")
        return []


def dump_checkpoint(trainer: Any, weights_only: bool) -> dict[str, Any]:
    """Lightning's own checkpoint of now; calls everybody's `on_save_checkpoint`.

    Args:
        trainer: A Trainer of either namespace.
        weights_only: Whether to leave out what a resume needs.
    """
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only)
    return checkpoint


def nonfinite_on_any_rank(trainer: Any, checkpoint: dict[str, Any], by_design: NonfiniteByDesign) -> list[str]:
    """The names of what is not finite and was not so by design, on whichever rank holds it; the same verdict on all.

    Args:
        trainer: A Trainer of either namespace.
        checkpoint: This rank's.
        by_design: What was not finite when training began.
    """
    names = by_design.unexpected(checked_tensors(checkpoint))
    if trainer.strategy.reduce_boolean_decision(not names, all=True):
        return []
    return names or ["what another rank holds"]


def is_of_a_stop(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was written by `StopCheckpoint`.

    Args:
        checkpoint: What was loaded.
    """
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
