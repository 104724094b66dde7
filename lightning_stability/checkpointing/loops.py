"""The two places in a fit where nothing is half done: there a checkpoint is right.

A save belongs where a batch, or an epoch, is over with all that Lightning does for it: the module's own hooks, the
logged row, a validation that was due, the schedulers. No hook is called there, and each one near by leaves something
out: a checkpoint written in `on_train_batch_end` of an epoch's last batch makes the resumed run drop an epoch. So
these methods of the Trainer's loops are overridden on the instances while a fit runs:

    epoch_loop.on_advance_end    afterwards a batch is over
    fit_loop._load_combined...   there are new loaders, not yet iterated over
    fit_loop.on_advance_end      afterwards an epoch is over
    fit_loop.on_advance_start    a resumed run is put where it was
    fit_loop.run                 a resumed run with nothing left to train ends like the one that was not interrupted
    epoch_loop.reset             left out once, where a resumed run is inside an epoch
    epoch_loop.on_run_start      the loaders are iterated over; a batch whose hooks alone were through is ended
    epoch_loop._on_before_fetch  a batch is fetched
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_stability import internals
from lightning_stability.checkpointing.buffers import HiddenBuffers
from lightning_stability.checkpointing.finite import FiniteCheck
from lightning_stability.checkpointing.loaders import TrainingData
from lightning_stability.checkpointing.metrics import capture_metrics
from lightning_stability.checkpointing.passes import Passes
from lightning_stability.checkpointing.resume import SECTION, Resume, epochs_are_through, steps_are_through
from lightning_stability.checkpointing.save_point import Listener as Listener
from lightning_stability.checkpointing.save_point import SavePoint as SavePoint
from lightning_stability.recovery.random_state import RandomState


class SavePoints:
    """Tells listeners of one Trainer the points where a save is right, and puts a resumed run there."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = weakref.ref(trainer)
        self._listeners: list[Listener] = []
        self._overrides = internals.Overrides()
        self._run_override = internals.Overrides()
        self._hook: Any = None
        self._resume: Resume | None = None
        self._passes = Passes()
        self._continues_inside_epoch = False
        self._batch_is_to_end = False
        self._noted = self._begun = self._prepared = False
        self._order_is_wanted = False
        self._global_step = 0
        self._optimizer_steps = 0
        self._batches = 0
        self.run_id = uuid.uuid4().hex
        self.starts = 0
        """How often this run has been started."""

    @classmethod
    def of(cls, trainer: Any) -> SavePoints:
        """The one of this Trainer."""
        points = _POINTS.get(trainer)
        if points is None:
            points = _POINTS[trainer] = cls(trainer)
        return points

    @property
    def trainer(self) -> Any:
        """The Trainer."""
        trainer = self._trainer()
        assert trainer is not None, "the save points do not outlive their Trainer"
        return trainer

    def prepare(self) -> None:
        """Follow the training loaders from when they are made, so that their position is known; from `setup` on."""
        if not self._prepared:
            self._prepared = True
            self._passes.start()
            self._override(self.trainer.fit_loop, internals.LOADERS_ARE_MADE, self._on_loaders_made)

    def _leave_loops(self) -> None:
        self._overrides.restore()
        self._passes.stop()
        self._passes.forget()
        self._prepared = False

    def begin(self) -> None:
        """Note what a fit begins with, in `on_train_start`; enough for `capture`, and overrides nothing."""
        if self._noted:
            return
        self._begun = self._order_is_wanted = False
        self.starts += 1
        module = self.trainer.lightning_module
        self._data = TrainingData(self.trainer, self._passes)
        self._buffers = HiddenBuffers(module)
        self.finite = FiniteCheck(module)
        self._global_step, self._optimizer_steps, self._batches = self.trainer.global_step, 0, 0
        self._trained_at_start = self._trained()
        self._noted = True

    def listen(self, listener: Listener, saves: bool = True) -> None:
        """Begin to tell a listener; from `on_train_start` on.

        Args:
            saves: Whether it saves at these points: then each epoch's order has to be known.
        """
        self.begin()
        self._order_is_wanted |= saves
        if not self._listeners:
            fit, epoch = self.trainer.fit_loop, self.trainer.fit_loop.epoch_loop
            self._override(fit, "on_advance_start", self._on_epoch_about_to_start)
            self._override(epoch, "reset", self._on_epoch_loop_reset)
            self._override(epoch, "on_run_start", self._on_epoch_loop_run_start)
            self._override(epoch, "_on_before_fetch", self._on_before_fetch)
            self._override(epoch, "on_advance_end", self._on_batch_over)
            self._override(fit, "on_advance_end", self._on_epoch_over)
            if not self.trainer.lightning_module.automatic_optimization:
                self._hook = register_optimizer_step_post_hook(_counting(weakref.ref(self)))
        if listener not in self._listeners:
            self._listeners.append(listener)

    def leave(self, listener: Listener) -> None:
        """Stop telling a listener; with the last one the Trainer is as it was before."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        if not self._listeners:
            self._leave_loops()
            self._run_override.restore()
            if self._hook is not None:
                self._hook.remove()
            self._hook = self._resume = None
            self._noted = False

    # Saving

    def at_end_of_batch(self) -> SavePoint | None:
        """The point of now, where `epoch_loop.on_advance_end` would be called or a hook just before it has failed.

        None if a batch has begun and not come to its end: nothing continues from there.
        """
        fit, epoch_loop = self.trainer.fit_loop, self.trainer.fit_loop.epoch_loop
        batches, epochs = epoch_loop.batch_progress.current, fit.epoch_progress.current
        if batches.ready != batches.processed or epochs.ready == epochs.processed:
            return None
        return SavePoint(self.trainer.current_epoch, batches.ready, stepped=True, ending=False, over=False)

    def leave_the_end_of_batch(self, checkpoint: dict[str, Any], point: SavePoint) -> None:
        """Have Lightning's own resume do what it does best: as after a save in `on_train_batch_end`.

        Args:
            checkpoint: Of `at_end_of_batch`; its loops are changed.
            point: What that returned.
        """
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]
        if batches["current"]["completed"] == batches["current"]["processed"]:
            for counts in (batches["total"], batches["current"]):
                counts["completed"] -= 1
        if not self.has_more_batches(point):
            loops["state_dict"].pop("combined_loader", None)  # from its end it would continue with an empty epoch

    def has_more_batches(self, point: SavePoint) -> bool:
        """Whether more of the epoch's batches are to come."""
        return point.batches > 0 and not internals.epoch_is_over(self.trainer)

    def capture(self, point: SavePoint) -> dict[str, Any]:
        """What an exact resume needs of this rank, beside Lightning's own checkpoint."""
        return {
            "random": RandomState.capture().state_dict(),
            "data": self._data.capture(self.has_more_batches(point)),
            "metrics": capture_metrics(self.trainer),
            "gradients": self._gradients(point),
            "buffers": self._buffers.capture(),
            "trained": {name: on for name, on in self._trained().items() if on != self._trained_at_start.get(name)},
        }

    @property
    def ends_a_batch_first(self) -> bool:
        """Whether the run that is resumed begins with what is left of a batch."""
        return self._resume is not None and not self._resume.batch_is_over

    @property
    def data(self) -> TrainingData:
        """The training data, from `listen` on."""
        return self._data

    def _gradients(self, point: SavePoint) -> dict[str, Any]:
        """Those that the next step adds to: Lightning zeroes them first, manual optimization when it likes."""
        module = self.trainer.lightning_module
        if module.automatic_optimization and (point.stepped or not point.batches):
            return {}
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    def _trained(self) -> dict[str, bool]:
        """What is frozen and what is not: callbacks change it in the course of a fit."""
        return {name: p.requires_grad for name, p in self.trainer.lightning_module.named_parameters()}

    # Resuming

    def resume_from(self, checkpoint: dict[str, Any], rank: int, world_size: int) -> None:
        """Take from a checkpoint what is restored when training starts.

        Args:
            checkpoint: It has a `SECTION`. Its loops are changed: Lightning would load the first rank's data position.
        """
        self._resume = Resume.of(checkpoint, checkpoint[SECTION], self.trainer, rank, world_size)
        if self._resume is not None:
            self.prepare()
            self.run_id, self.starts = checkpoint[SECTION]["run_id"], checkpoint[SECTION]["start"]
            self._run_override.restore()
            run = self.trainer.fit_loop.run
            self._run_override.set(self.trainer.fit_loop, "run", lambda: self._run(run))

    def _run(self, original: Callable[[], None]) -> None:
        self._run_override.restore()
        resume = self._resume
        self.trainer.fit_loop.setup_data()
        if resume is None or not resume.nothing_is_left(self.trainer):
            original()
            return
        internals.run_to_the_end(self.trainer, resume.inside_epoch, self._continue_at_the_end)

    def _continue_at_the_end(self) -> None:
        resume, self._resume = self._resume, None
        if resume is not None:
            self._load(resume)
            resume.restore_at_end()
            self._tell_resumed()

    def _continue(self, resume: Resume) -> None:
        self._load(resume)
        self._batch_is_to_end = resume.restore(self._data)
        self._continues_inside_epoch = resume.inside_epoch
        self._global_step = self.trainer.global_step - (1 if self._batch_is_to_end else 0)
        self._tell_resumed()

    def _load(self, resume: Resume) -> None:
        self._buffers.restore(resume.buffers)
        self.finite.load_state_dict(resume.nonfinite_before)

    def _tell_resumed(self) -> None:
        for listener in self._listeners:
            listener.on_resumed(self.trainer)
        if not self._listeners:
            self._leave_loops()

    # In place of the loops' methods

    def _on_loaders_made(self, original: Callable[..., None]) -> None:
        original()
        self._passes.follow(internals.combined_loader(self.trainer).flattened, self.trainer.world_size)
        if self._resume is not None and self._resume.knows_positions:
            self._passes.hold()  # until `_continue`: nothing is loaded that is not trained

    def _on_epoch_about_to_start(self, original: Callable[..., None]) -> None:
        resume, self._resume = self._resume, None
        if resume is not None:
            self._continue(resume)
        elif not self._begun and self.trainer.current_epoch == 0 and not self.trainer.fit_loop.restarting:
            self._try(self._data.begin_first_epoch)
        self._begun = True
        before = self._try(self.finite.before_hooks)
        original()
        self._try(self.finite.after_hooks, before or {})

    def _on_epoch_loop_reset(self, original: Callable[..., None]) -> None:
        # Lightning's own would count the last batch, and validate, a second time.
        continues, self._continues_inside_epoch = self._continues_inside_epoch, False
        if not continues:
            original()

    def _on_epoch_loop_run_start(self, original: Callable[..., None], fetcher: Any) -> None:
        fit = self.trainer.fit_loop
        wanted = self._order_is_wanted or self._data.has_fixed_order
        if wanted and self.trainer.current_epoch > 0 and not fit.is_resuming and not fit.epoch_loop.restarting:
            self._try(self._data.before_epoch)
        original(fetcher)
        ends, self._batch_is_to_end = self._batch_is_to_end, False
        if ends:
            fit.epoch_loop.on_advance_end(fetcher)

    def _on_before_fetch(self, original: Callable[..., None]) -> None:
        self._try(self._data.before_fetch)
        original()

    def _on_batch_over(self, original: Callable[..., None], fetcher: Any) -> None:
        original(fetcher)
        self._batches += 1
        if self._batches == 1:
            self._try(self.finite.after_first_batch)
        epoch_loop = self.trainer.fit_loop.epoch_loop
        stepped = self._has_stepped()
        if internals.epoch_is_over(self.trainer):
            return  # in a moment
        self._tell(
            SavePoint(
                epoch=self.trainer.current_epoch,
                batches=epoch_loop.batch_progress.current.ready,
                stepped=stepped,
                ending=epoch_loop.done,
            )
        )

    def _on_epoch_over(self, original: Callable[..., None]) -> None:
        whole = internals.epoch_is_over(self.trainer)
        before = self._try(self.finite.before_hooks)
        original()
        self._try(self.finite.after_hooks, before or {}, True)
        if whole:
            self._global_step = self.trainer.global_step
            self._tell(SavePoint(epoch=self.trainer.current_epoch, batches=0, stepped=True, ending=self._fit_ends()))

    def _tell(self, point: SavePoint) -> None:
        for listener in list(self._listeners):
            if listener in self.trainer.callbacks:  # not while a tuner trains with callbacks of its own
                listener.on_place(self.trainer, point)

    def _try(self, action: Callable[..., Any], *args: Any) -> Any:
        """Call it; if it fails, the run continues where no listener needs the points."""
        try:
            return action(*args)
        except Exception as error:
            answers = [listener.on_failure(self.trainer, error) for listener in list(self._listeners)]
            if not all(answers):
                raise
            return None

    def _has_stepped(self) -> bool:
        """Whether the optimizer has stepped in the batch that is over.

        In manual optimization Lightning does not see every step: `use_pl_optimizer=False`, and optimizers that the
        module keeps for itself. Where nobody has seen any, each batch counts as one.
        """
        if self.trainer.lightning_module.automatic_optimization:
            self._global_step = self.trainer.global_step
            return not internals.window_is_incomplete(self.trainer)
        counted, self._global_step = self.trainer.global_step > self._global_step, self.trainer.global_step
        seen, self._stepped_in_batch = self._stepped_in_batch, False
        return counted or seen or not (self._optimizer_steps or self._global_step)

    _stepped_in_batch = False

    def note_optimizer_step(self) -> None:
        """An optimizer of whoever has stepped."""
        self._optimizer_steps += 1
        self._stepped_in_batch = True

    def _fit_ends(self) -> bool:
        """What `fit_loop.done` is about to find, without what it prints."""
        trainer = self.trainer
        return (
            steps_are_through(trainer)
            or epochs_are_through(trainer)
            or (bool(trainer.should_stop) and internals.can_stop_early(trainer))
        )

    def _override(self, owner: Any, name: str, wrapper: Callable[..., None]) -> None:
        original = getattr(owner, name)
        self._overrides.set(owner, name, lambda *args: wrapper(original, *args))


_POINTS: weakref.WeakKeyDictionary[Any, SavePoints] = weakref.WeakKeyDictionary()


def _counting(points: weakref.ref[SavePoints]) -> Callable[..., None]:
    def count(*args: Any) -> None:
        found = points()
        if found is not None:
            found.note_optimizer_step()

    return count
