"""The two places in a fit where nothing is half done, and how to go on from there.

A save belongs where a batch, or an epoch, is over with all that Lightning does for it: the module's own hooks, the
logged row, a validation that was due, the schedulers. No hook is called there, and each one near by leaves something
out: a checkpoint written in `on_train_batch_end` of an epoch's last batch makes the resumed run drop an epoch. So
these methods of the Trainer's loops are stood in for, as attributes of the instances, while a fit runs:

    epoch_loop.on_advance_end    afterwards a batch is over
    fit_loop.on_advance_end      afterwards an epoch is over
    fit_loop.on_advance_start    a resumed run is put where it was
    epoch_loop.reset             left out once, where a resumed run is inside an epoch
    epoch_loop.on_run_start      the loaders are iterated over; a batch whose hooks alone were through is ended
    epoch_loop._on_before_fetch  a batch is fetched

What a resume needs of the private names of Lightning's loops is touched here, those of the data in `loaders.py`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_stability._compat import is_instance_by_name
from lightning_stability.checkpointing.loaders import TrainingData
from lightning_stability.checkpointing.metrics import capture_metrics, restore_metrics
from lightning_stability.checkpointing.random_state import capture_random_state, restore_random_state

SECTION = "lightning_stability"
"""The key of what an exact resume needs, beside Lightning's own, in a checkpoint."""

FORMAT = 2
"""Raised when what is in the section changes, so that no half of it is taken for the whole."""

_SET_AN_EPOCH_UP = ("GradientAccumulationScheduler", "StochasticWeightAveraging")
"""Lightning's callbacks that set in `on_train_epoch_start` what they keep in no checkpoint."""


@dataclass(frozen=True)
class Place:
    """Where a run is when a batch or an epoch is over."""

    epoch: int
    """Epochs that are over."""
    batches: int
    """Batches that are over in the epoch under way; 0 between two epochs."""
    stepped: bool
    """Whether the optimizer has stepped in the last batch."""
    ending: bool
    """Whether the fit ends here."""
    over: bool = True
    """Whether the batch is over. If only its hooks are, a resumed run begins with what is left of it."""

    def epochs(self, batches_per_epoch: float) -> Fraction:
        """Epochs trained, as a fraction.

        Args:
            batches_per_epoch: The length of the epoch under way.
        """
        return self.epoch + Fraction(min(self.batches, int(batches_per_epoch)), int(batches_per_epoch))


class Listener(Protocol):
    """Is told of the places where a save is right."""

    def on_place(self, trainer: Any, place: Place) -> None:
        """Called when a batch, or the last one's epoch, is over."""

    def on_resumed(self, trainer: Any) -> None:
        """Called when a resumed run is where it was."""


class TrainingPlaces:
    """Tells listeners of one Trainer the places where a save is right, and puts a resumed run there.

    Args:
        trainer: A Trainer of either namespace.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = weakref.ref(trainer)
        self._listeners: list[Listener] = []
        self._wrapped: list[tuple[Any, str, Any]] = []
        self._resume: dict[str, Any] | None = None
        self._goes_on_inside_epoch = False
        self._batch_is_to_end = False
        self._begun = False
        self._order_is_wanted = False
        self._global_step = 0

    @classmethod
    def of(cls, trainer: Any) -> TrainingPlaces:
        """The one of this Trainer."""
        places = _PLACES.get(trainer)
        if places is None:
            places = _PLACES[trainer] = cls(trainer)
        return places

    @property
    def trainer(self) -> Any:
        """The Trainer."""
        trainer = self._trainer()
        assert trainer is not None, "the places do not outlive their Trainer"
        return trainer

    def begin(self) -> None:
        """Note what a fit begins with, in `on_train_start`; enough for `capture`, and nothing in the loops' place."""
        if not self._listeners:
            self._begun = self._order_is_wanted = False
            self._data = TrainingData(self.trainer)
            self._global_step = self.trainer.global_step
            self._trained_at_start = self._trained()

    def listen(self, listener: Listener, saves: bool = True) -> None:
        """Begin to tell a listener; from `on_train_start` on.

        Args:
            listener: Who is told.
            saves: Whether it saves at the places that it is told of: then each epoch's order has to be known.
        """
        self.begin()
        self._order_is_wanted |= saves
        if not self._listeners:
            fit, epoch = self.trainer.fit_loop, self.trainer.fit_loop.epoch_loop
            self._wrap(fit, "on_advance_start", self._on_epoch_about_to_start)
            self._wrap(epoch, "reset", self._on_epoch_loop_reset)
            self._wrap(epoch, "on_run_start", self._on_epoch_loop_run_start)
            self._wrap(epoch, "_on_before_fetch", self._on_before_fetch)
            self._wrap(epoch, "on_advance_end", self._on_batch_over)
            self._wrap(fit, "on_advance_end", self._on_epoch_over)
        if listener not in self._listeners:
            self._listeners.append(listener)

    def leave(self, listener: Listener) -> None:
        """Stop telling a listener; with the last one the Trainer is as it was before."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        if not self._listeners:
            for owner, name, wrapper in self._wrapped:
                if vars(owner).get(name) is wrapper:
                    delattr(owner, name)
            self._wrapped.clear()
            self._resume = None

    # Saving

    def at_end_of_batch(self) -> Place | None:
        """The place of now, where `epoch_loop.on_advance_end` would be called or a hook just before it has failed.

        None if a batch has begun and not come to its end: nothing goes on from there.
        """
        fit, epoch_loop = self.trainer.fit_loop, self.trainer.fit_loop.epoch_loop
        batches, epochs = epoch_loop.batch_progress.current, fit.epoch_progress.current
        if batches.ready != batches.processed or epochs.ready == epochs.processed:
            return None
        return Place(self.trainer.current_epoch, batches.ready, stepped=True, ending=False, over=False)

    def leave_the_end_of_batch(self, checkpoint: dict[str, Any], place: Place) -> None:
        """Have Lightning's own resume do what it does best: as after a save in `on_train_batch_end`.

        Args:
            checkpoint: Of `at_end_of_batch`; its loops are changed.
            place: What that returned.
        """
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]
        if batches["current"]["completed"] == batches["current"]["processed"]:
            for counts in (batches["total"], batches["current"]):
                counts["completed"] -= 1
        if not self.has_more_batches(place):
            loops["state_dict"].pop("combined_loader", None)  # from its end it would go on with an empty epoch

    def has_more_batches(self, place: Place) -> bool:
        """Whether more of the epoch's batches are to come."""
        return place.batches > 0 and not self.trainer.fit_loop.epoch_loop._num_ready_batches_reached()

    def capture(self, place: Place) -> dict[str, Any]:
        """What an exact resume needs of this rank, beside Lightning's own checkpoint."""
        return {
            "random": capture_random_state(),
            "data": self._data.capture(self.has_more_batches(place)),
            "metrics": capture_metrics(self.trainer),
            "gradients": self._gradients(place),
            "trained": {name: on for name, on in self._trained().items() if on != self._trained_at_start.get(name)},
        }

    @property
    def ends_a_batch_first(self) -> bool:
        """Whether the run that is resumed begins with what is left of a batch."""
        return self._resume is not None and not self._resume["batch_is_over"]

    @property
    def data(self) -> TrainingData:
        """The training data, from `listen` on."""
        return self._data

    def _gradients(self, place: Place) -> dict[str, Any]:
        """Those that the next step adds to: Lightning zeroes them first, manual optimization when it likes."""
        module = self.trainer.lightning_module
        if module.automatic_optimization and (place.stepped or not place.batches):
            return {}
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    def _trained(self) -> dict[str, bool]:
        """What is frozen and what is not: callbacks change it in the course of a fit."""
        return {name: p.requires_grad for name, p in self.trainer.lightning_module.named_parameters()}

    # Resuming

    def resume_from(self, checkpoint: dict[str, Any], rank: int, world_size: int) -> None:
        """Take from a checkpoint what is put back when training starts.

        Args:
            checkpoint: It has a `SECTION`. Its loops are changed: Lightning would load the first rank's data position.
            rank: This process's.
            world_size: How many there are.
        """
        section = checkpoint[SECTION]
        if section.get("format") != FORMAT:
            rank_zero_warn(
                "The checkpoint was written by another version of lightning-stability: Lightning's own resume goes on"
                " from it, and batches and random numbers will not be those of the run that was interrupted."
            )
            return
        if len(section["ranks"]) != world_size:
            rank_zero_warn(
                f"The checkpoint was written by {len(section['ranks'])} processes and is loaded by {world_size}:"
                " batches and random numbers will not be those of the run that goes on."
            )
            return
        loops = checkpoint["loops"]["fit_loop"]
        loops["state_dict"].pop("combined_loader", None)
        if not section["batch_is_over"]:  # here it goes on as `leave_the_end_of_batch` cannot have Lightning do
            for counts in loops["epoch_loop.batch_progress"]["total"], loops["epoch_loop.batch_progress"]["current"]:
                counts["completed"] += 1
        self._resume = {
            "loops": copy.deepcopy(loops),
            "inside_epoch": section["inside_epoch"],
            "more_batches": section["more_batches"],
            "batch_is_over": section["batch_is_over"],
            "reloaded_in_epoch": section["reloaded_in_epoch"],
            "stop_is_due": section["stop_is_due"],
            "rank": section["ranks"][rank],
            "rounded": self._rounded(checkpoint.get("current_model_state", checkpoint.get("state_dict", {}))),
        }

    def _rounded(self, saved: dict[str, Any]) -> dict[str, Any]:
        """With `precision="64-true"` Lightning loads into the module before it makes its weights float64."""
        own = self.trainer.lightning_module.state_dict()
        wide = {name: tensor for name, tensor in saved.items() if getattr(tensor, "dtype", None) == torch.float64}
        return {name: tensor for name, tensor in wide.items() if name in own and own[name].dtype == torch.float32}

    def _go_on(self, resume: dict[str, Any]) -> None:
        fit, epoch_loop = self.trainer.fit_loop, self.trainer.fit_loop.epoch_loop
        inside, rank = resume["inside_epoch"], resume["rank"]
        fit.load_state_dict(resume["loops"])
        fit.update_restart_stage()  # inside an epoch: the hooks of its start are not called again
        _not_restarting(fit)
        self._batch_is_to_end = not resume["batch_is_over"]
        epoch_loop.reset_restart_stage()
        if not inside:
            fit.reset_restart_stage()
            fit._resuming_from_checkpoint = False  # so that Lightning iterates over the loaders for a new epoch
        if resume["reloaded_in_epoch"] is not None:
            self._load_data_as_in_epoch(resume["reloaded_in_epoch"])
        self._goes_on_inside_epoch = inside
        self.trainer.should_stop = resume["stop_is_due"]
        epoch = fit.epoch_progress.current.processed - (0 if inside else 1)
        if not self._data.restore(rank["data"], epoch, resume["more_batches"]):
            # else it would be short of as many batches of these data as it has had of those
            epoch_loop.batch_progress.reset_on_run()
            self._batch_is_to_end = False
            rank = {**rank, "gradients": {}}
        restore_metrics(self.trainer, rank["metrics"])
        own = self.trainer.lightning_module.state_dict()
        for name, tensor in resume["rounded"].items():
            own[name].copy_(tensor)
        for name, parameter in self.trainer.lightning_module.named_parameters():
            parameter.requires_grad_(rank["trained"].get(name, parameter.requires_grad))
            if name in rank["gradients"]:
                parameter.grad = rank["gradients"][name].to(parameter.device)
        if inside:
            self._set_epoch_up()
        restore_random_state(rank["random"])
        self._global_step = self.trainer.global_step - (1 if self._batch_is_to_end else 0)

    def _load_data_as_in_epoch(self, epoch: int) -> None:
        """Ask for the loaders as in that epoch; they may be others than those of now."""
        fit = self.trainer.fit_loop
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

    def _set_epoch_up(self) -> None:
        trainer = self.trainer
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = [group["lr"] for group in groups]
        for callback in trainer.callbacks:
            if is_instance_by_name(callback, *_SET_AN_EPOCH_UP):
                callback.on_train_epoch_start(trainer, trainer.lightning_module)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate  # a scheduler that is made sets its first

    @property
    def reloaded_in_epoch(self) -> int | None:
        """The epoch in which the loaders were made, where `reload_dataloaders_every_n_epochs` makes new ones."""
        if not self.trainer.reload_dataloaders_every_n_epochs:
            return None
        return int(self.trainer.fit_loop._last_train_dl_reload_epoch)

    # In the loops' place

    def _on_epoch_about_to_start(self, original: Callable[..., None]) -> None:
        resume, self._resume = self._resume, None
        if resume is not None:
            self._go_on(resume)
            for listener in self._listeners:
                listener.on_resumed(self.trainer)
        elif not self._begun and self.trainer.current_epoch == 0 and not self.trainer.fit_loop.restarting:
            self._data.begin_first_epoch()
        self._begun = True
        original()

    def _on_epoch_loop_reset(self, original: Callable[..., None]) -> None:
        # Lightning's own would count the last batch, and validate, a second time.
        goes_on, self._goes_on_inside_epoch = self._goes_on_inside_epoch, False
        if not goes_on:
            original()

    def _on_epoch_loop_run_start(self, original: Callable[..., None], fetcher: Any) -> None:
        fit = self.trainer.fit_loop
        wanted = self._order_is_wanted or self._data.has_fixed_order
        if wanted and self.trainer.current_epoch > 0 and not fit.is_resuming and not fit.epoch_loop.restarting:
            self._data.before_epoch()
        original(fetcher)
        ends, self._batch_is_to_end = self._batch_is_to_end, False
        if ends:
            fit.epoch_loop.on_advance_end(fetcher)

    def _on_before_fetch(self, original: Callable[..., None]) -> None:
        self._data.before_fetch()
        original()

    def _on_batch_over(self, original: Callable[..., None], fetcher: Any) -> None:
        original(fetcher)
        epoch_loop = self.trainer.fit_loop.epoch_loop
        stepped = self._has_stepped()
        if epoch_loop._num_ready_batches_reached():
            return  # the epoch is over in a moment
        place = Place(
            epoch=self.trainer.current_epoch,
            batches=epoch_loop.batch_progress.current.ready,
            stepped=stepped,
            ending=epoch_loop.done,
        )
        self._tell(place)

    def _on_epoch_over(self, original: Callable[..., None]) -> None:
        whole = self.trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        original()
        if whole:
            self._global_step = self.trainer.global_step
            self._tell(Place(epoch=self.trainer.current_epoch, batches=0, stepped=True, ending=self._fit_ends()))

    def _tell(self, place: Place) -> None:
        for listener in list(self._listeners):
            if listener in self.trainer.callbacks:  # not while a tuner trains with callbacks of its own
                listener.on_place(self.trainer, place)

    def _has_stepped(self) -> bool:
        module = self.trainer.lightning_module
        before, self._global_step = self._global_step, self.trainer.global_step
        if module.automatic_optimization:
            return not self.trainer.fit_loop.epoch_loop._should_accumulate()
        return bool(self._global_step > before)

    def _fit_ends(self) -> bool:
        """What `fit_loop.done` is about to find, without what it prints."""
        trainer, fit = self.trainer, self.trainer.fit_loop
        return bool(
            (trainer.max_steps not in (-1, None) and trainer.global_step >= trainer.max_steps)
            or (fit.max_epochs not in (-1, None) and fit.epoch_progress.current.processed >= fit.max_epochs)
            or (trainer.should_stop and fit._can_stop_early)
        )

    def _wrap(self, owner: Any, name: str, wrapper: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def stand_in(*args: Any) -> None:
            wrapper(original, *args)

        setattr(owner, name, stand_in)
        self._wrapped.append((owner, name, stand_in))


_PLACES: weakref.WeakKeyDictionary[Any, TrainingPlaces] = weakref.WeakKeyDictionary()


def _not_restarting(loop: Any) -> None:
    loop._restarting = False
    for inner in vars(loop).values():
        if hasattr(inner, "_restarting"):
            _not_restarting(inner)
