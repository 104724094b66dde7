"""Putting a resumed run where the interrupted one was."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_stability import internals
from lightning_stability._compat import is_instance_by_name
from lightning_stability.checkpointing.elastic import state_of_rank
from lightning_stability.checkpointing.loaders import TrainingData
from lightning_stability.checkpointing.metrics import restore_metrics
from lightning_stability.notices import warn
from lightning_stability.recovery.random_state import RandomState

SECTION = "lightning_stability"
"""The key of what an exact resume needs, beside Lightning's own, in a checkpoint."""

FORMAT = 4
"""Raised when what is in the section changes, so that no half of it is taken for the whole."""

READABLE = (3, 4)
"""The formats that an exact resume continues from. In 3 there is no position of loaders without a state."""

_SET_AN_EPOCH_UP = ("GradientAccumulationScheduler", "StochasticWeightAveraging")
"""Lightning's callbacks that set in `on_train_epoch_start` what they keep in no checkpoint."""


@dataclass
class Resume:
    """What was read from a checkpoint, until training starts."""

    trainer: Any
    loops: dict[str, Any]
    rank: dict[str, Any]
    """This rank's own state."""
    inside_epoch: bool
    more_batches: bool
    batch_is_over: bool
    reloaded_in_epoch: int | None
    stop_is_due: bool
    nonfinite_before: dict[str, Tensor]
    rounded: dict[str, Tensor] = field(default_factory=dict)
    """Weights that Lightning loads before it makes the module's float64."""

    @classmethod
    def of(
        cls, checkpoint: dict[str, Any], section: dict[str, Any], trainer: Any, rank: int, world_size: int
    ) -> Resume | None:
        """Read a checkpoint's section; None, with a warning, where Lightning's own resume is all there can be."""
        if (found := section.get("format")) not in READABLE:
            version = "a newer" if isinstance(found, int) and found > FORMAT else "another"
            warn(
                f"The checkpoint was written by {version} version of lightning-stability, in format {found}; this one"
                f" reads {' and '.join(map(str, READABLE))}. Lightning's own resume continues from it, and batches and"
                " random numbers will not be those of the run that was interrupted."
            )
            return None
        ranks = section["ranks"]
        if len(ranks) == world_size:
            own_rank = ranks[rank]
        else:
            own_rank = state_of_rank(ranks, rank, world_size, trainer.lightning_module)
            if not section["more_batches"]:  # else more is to be said when the data is there
                warn(
                    f"The checkpoint was written by {len(ranks)} processes and is loaded by {world_size}: batches and"
                    " random numbers will not be those of the run that was interrupted."
                )
        loops = checkpoint["loops"]["fit_loop"]
        loops["state_dict"].pop("combined_loader", None)
        if not section["batch_is_over"]:  # here it continues as Lightning's own resume cannot
            for counts in loops["epoch_loop.batch_progress"]["total"], loops["epoch_loop.batch_progress"]["current"]:
                counts["completed"] += 1
        return cls(
            trainer=trainer,
            loops=copy.deepcopy(loops),
            rank={**own_rank, "data": {"positions": None, **own_rank["data"]}},
            inside_epoch=section["inside_epoch"],
            more_batches=section["more_batches"],
            batch_is_over=section["batch_is_over"],
            reloaded_in_epoch=section["reloaded_in_epoch"],
            stop_is_due=section["stop_is_due"] or (section["stopped_early"] and _stops_early(trainer)),
            nonfinite_before=section["nonfinite_before"],
            rounded=_rounded(checkpoint.get("current_model_state", checkpoint.get("state_dict", {})), trainer),
        )

    @property
    def knows_positions(self) -> bool:
        """Whether loaders can begin where they were."""
        return any(self.rank["data"]["positions"] or ())

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Those that are in no `state_dict`."""
        found: dict[str, Tensor] = self.rank["buffers"]
        return found

    def nothing_is_left(self, trainer: Any) -> bool:
        """Whether no batch is to be trained any more."""
        stops = self.stop_is_due and internals.can_stop_early(trainer)
        if self.inside_epoch:  # Lightning leaves the epoch for these alone
            return stops or steps_are_through(trainer)
        return stops or steps_are_through(trainer) or epochs_are_through(trainer)

    def restore(self, data: TrainingData) -> bool:
        """Restore everything where an epoch would start.

        Returns:
            Whether the rest of a batch comes first.
        """
        trainer, inside = self.trainer, self.inside_epoch
        internals.load_loop_progress(trainer, self.loops, inside)
        batch_is_to_end, gradients = not self.batch_is_over, self.rank["gradients"]
        if self.reloaded_in_epoch is not None:
            internals.load_loaders_of_epoch(trainer, self.reloaded_in_epoch)
        trainer.should_stop = self.stop_is_due
        epoch = trainer.fit_loop.epoch_progress.current.processed - (0 if inside else 1)
        own_random = RandomState.capture()
        done = data.restore(self.rank["data"], epoch, self.more_batches)
        if done is None:
            # else it would be short of as many batches of these data as it has had of those
            trainer.fit_loop.epoch_loop.batch_progress.reset_on_run()
            batch_is_to_end, gradients = False, {}
        elif self.more_batches:
            internals.set_batches_of_epoch(trainer, done)
        self._restore_module(gradients)
        if inside:
            _set_epoch_up(trainer)
        saved = self.rank["random"]
        (own_random if saved is None else RandomState.from_state_dict(saved)).restore()
        return batch_is_to_end

    def restore_at_end(self) -> None:
        """Restore everything between the last epoch and the end of fit."""
        internals.load_loop_progress(self.trainer, self.loops, inside_epoch=False)
        self.trainer.should_stop = self.stop_is_due
        self._restore_module(self.rank["gradients"])
        for callback in self.trainer.callbacks:
            if is_instance_by_name(callback, "StochasticWeightAveraging"):
                internals.prepare_end_of_averaging(self.trainer, callback)
        if self.rank["random"] is not None:
            RandomState.from_state_dict(self.rank["random"]).restore()

    def _restore_module(self, gradients: dict[str, Tensor]) -> None:
        module = self.trainer.lightning_module
        restore_metrics(self.trainer, self.rank["metrics"])
        own = module.state_dict() if self.rounded else {}
        for name, tensor in self.rounded.items():
            own[name].copy_(tensor)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self.rank["trained"].get(name, parameter.requires_grad))
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device)


def steps_are_through(trainer: Any) -> bool:
    """Whether `max_steps` is reached."""
    return trainer.max_steps not in (-1, None) and trainer.global_step >= trainer.max_steps


def epochs_are_through(trainer: Any) -> bool:
    """Whether `max_epochs` is reached."""
    fit = trainer.fit_loop
    return fit.max_epochs not in (-1, None) and fit.epoch_progress.current.processed >= fit.max_epochs


def was_stopped_early(trainer: Any) -> bool:
    """Whether an EarlyStopping has ended this run: whoever resumes it with the same one finds it ended."""
    return bool(trainer.should_stop) and any(
        getattr(callback, "stopping_reason_message", None) for callback in _early_stopping(trainer)
    )


def _stops_early(trainer: Any) -> bool:
    return bool(_early_stopping(trainer))


def _early_stopping(trainer: Any) -> list[Any]:
    return [callback for callback in trainer.callbacks if is_instance_by_name(callback, "EarlyStopping")]


def _rounded(saved: dict[str, Any], trainer: Any) -> dict[str, Tensor]:
    """With `precision="64-true"` Lightning loads into the module before it makes its weights float64."""
    own = trainer.lightning_module.state_dict()
    wide = {name: tensor for name, tensor in saved.items() if getattr(tensor, "dtype", None) == torch.float64}
    return {name: tensor for name, tensor in wide.items() if name in own and own[name].dtype == torch.float32}


def _set_epoch_up(trainer: Any) -> None:
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    for callback in trainer.callbacks:
        if is_instance_by_name(callback, *_SET_AN_EPOCH_UP):
            callback.on_train_epoch_start(trainer, trainer.lightning_module)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate  # a scheduler that is made sets its first
