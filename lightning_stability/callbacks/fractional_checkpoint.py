"""FractionalCheckpoint: a checkpoint every quarter of an epoch, always loadable, always finite, resumed exactly."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_stability import internals
from lightning_stability._compat import MisconfigurationException
from lightning_stability.callbacks.base import SessionMember, warn, warn_always, warn_of_forgotten_precision
from lightning_stability.callbacks.checkpoint_messages import warn_of_failure, warn_of_inexact_data, why_refused
from lightning_stability.callbacks.ranked_checkpoint import RankedCheckpoint, refuse_other_triggers
from lightning_stability.callbacks.resume_proof import ProvesResume
from lightning_stability.checkpointing import writing
from lightning_stability.checkpointing.listing import list_checkpoints
from lightning_stability.checkpointing.loops import SavePoint, SavePoints
from lightning_stability.checkpointing.own_objects import allow_own_hyperparameters
from lightning_stability.checkpointing.resume import SECTION
from lightning_stability.checkpointing.saving import PendingSave, Saver, can_write_in_background
from lightning_stability.checkpointing.schedule import EpochCount, EpochSchedule
from lightning_stability.checkpointing.section import look_on_all_ranks, make_section
from lightning_stability.checkpointing.stopping import checkpoint_folder
from lightning_stability.events import EventLog


class FractionalCheckpoint(ProvesResume, SessionMember, RankedCheckpoint):
    """Saves every `every_n_epochs` epochs, fractions included, and lets a run resume as if nothing had happened.

    It is a `ModelCheckpoint` with another trigger: `monitor`, `save_top_k`, `save_last`, `filename`, `dirpath` and
    remote file systems work as there. The k-th save comes at the first optimizer step at or after
    `k * every_n_epochs`, counted over all epochs. A validation that is due at that step comes first. The end of fit
    is saved too.

    A checkpoint holds what an exact resume needs, of every rank: the random states, the position of the data, the
    sums of `self.log`, and the states of torchmetrics. Weights, buffers and optimizer state are checked before
    anything is written, and what became non-finite is not saved. Files are written beside, flushed, then moved into
    place.

    The `save_top_k` best are kept, and always the newest. A metric that is NaN makes no checkpoint the best.

    Args:
        every_n_epochs: The interval, above 0: 0.25 saves four times an epoch.
        steps_per_epoch: Optimizer steps of an epoch, for data whose length is not known.
        async_save: Whether to write in the background. Training then waits for a copy in host memory only.
        skip_by_loading: Whether a resume loads again, and leaves out, what was trained of data without a position.
        dirpath: The folder; by default `checkpoints` in the logger's.
        filename: The files' name. `{epoch}` is the number of epochs trained, `000.25`; `{step}` and any logged metric
            can be used too.
        monitor: The logged metric that ranks checkpoints; without one only the newest is kept.
        mode: Whether `"min"` or `"max"` of it is best.
        save_top_k: How many of the best are kept; -1 keeps all.
        save_last: Whether there is a `last.ckpt`; `"link"` makes it a symbolic link.
        save_weights_only: Whether to leave out what a resume needs.
        allow_nonfinite: Names of weights or buffers that may become infinite or NaN, as in `state_dict`; `*` stands for
            anything. What is so by design when training starts need not be named.
        verbose: Whether to say when a checkpoint is saved.
        auto_insert_metric_name: Whether file names hold the names of the metrics in them.
        enable_version_counter: Whether to append `-v1` rather than overwrite.
        other_trigger: Nothing; ModelCheckpoint's other triggers are refused.

    Raises:
        MisconfigurationException: If an option is out of range or another trigger is given; when training starts, if
            the data has no length and `steps_per_epoch` is not given.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from lightning_stability import FractionalCheckpoint
        >>> checkpoint = FractionalCheckpoint(every_n_epochs=0.25, monitor="val_loss", save_top_k=2)
        >>> trainer = Trainer(max_epochs=3, callbacks=[checkpoint], logger=False)
    """

    max_failures = 3
    """How many saves in a row may fail before training is stopped."""

    def __init__(
        self,
        every_n_epochs: float = 0.25,
        steps_per_epoch: int | None = None,
        async_save: bool = False,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_last: bool | Literal["link"] | None = True,
        save_weights_only: bool = False,
        verbose: bool = False,
        auto_insert_metric_name: bool = True,
        enable_version_counter: bool = True,
        allow_nonfinite: str | Sequence[str] = (),
        skip_by_loading: bool = False,
        **other_trigger: Any,
    ) -> None:
        refuse_other_triggers(other_trigger)
        self._require_path(dirpath=dirpath)
        self._require_flag(async_save=async_save, skip_by_loading=skip_by_loading)
        if filename == self.CHECKPOINT_NAME_LAST and save_last:
            raise MisconfigurationException(
                f"FractionalCheckpoint(filename={filename!r}): it is save_last's name. Choose another, or leave it out."
            )
        super().__init__(
            dirpath=None if dirpath is None else writing.without_protocol(str(dirpath)),
            filename=filename or "{epoch}-{step:06d}",
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            save_weights_only=save_weights_only,
            verbose=verbose,
            auto_insert_metric_name=auto_insert_metric_name,
            enable_version_counter=enable_version_counter,
        )
        self._every_n_epochs: float = _above_zero("every_n_epochs", every_n_epochs)  # type: ignore[assignment]
        self._schedule = EpochSchedule(every_n_epochs)
        self.steps_per_epoch = steps_per_epoch
        if steps_per_epoch is not None:
            self._require_number(1, steps_per_epoch=steps_per_epoch)
        self.async_save, self.skip_by_loading = async_save, skip_by_loading
        self.allow_nonfinite = self._names(allow_nonfinite=allow_nonfinite)
        self._begin_fit()

    def _begin_fit(self) -> None:
        self._failures = 0
        self._ranked = None
        self._missed_monitor = False
        self._saved_at = None
        self._looked = False
        self._saver: Saver | None = None
        self._events = EventLog(None)

    reads_steps = False

    def is_needed(self, trainer: Any) -> bool:
        """Only in a run that keeps files."""
        return not trainer.fast_dev_run

    # What Lightning calls

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the folder, refuse what cannot be done."""
        if self.automatic and self.dirpath is None and (folder := checkpoint_folder(trainer)):
            self.dirpath = folder  # no folder that the project would not have without the package
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or trainer.fast_dev_run:
            return
        allow_own_hyperparameters(pl_module)
        self._leave(trainer)
        self._begin_fit()
        if self.session is not None:
            self._events = self.session.events
        if self.async_save and not can_write_in_background(trainer, str(self.dirpath)):
            raise MisconfigurationException(
                f"FractionalCheckpoint(async_save=True) cannot be used with {type(trainer.strategy).__name__} and"
                f" {type(trainer.strategy.checkpoint_io).__name__}, which write in their own way; leave async_save out."
            )
        self._saver = Saver(self.async_save)
        SavePoints.of(trainer).prepare()
        if trainer.is_global_zero:
            writing.remove_parts(str(self.dirpath))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to listen for points where a save is right."""
        if trainer.fast_dev_run or self._saver is None:
            return
        points = SavePoints.of(trainer)
        points.listen(self)
        points.data.skips_by_loading = self.skip_by_loading
        points.finite.allow(self.allow_nonfinite)
        if trainer.is_global_zero and points.starts > 1 and writing.is_local(str(self.dirpath)):
            earlier = [info.start for info in list_checkpoints(str(self.dirpath)) if info.run == points.run_id]
            points.starts = max([points.starts, *(start + 1 for start in earlier)])
        self._batches_per_epoch(trainer)
        self._schedule.start_at(self._epochs_at_start(trainer))
        self._warn_of_refusal(points)
        if not self.save_weights_only:
            warn_of_inexact_data(points)
            self._begin_proof(
                trainer, str(self.dirpath), self._events, self.session.drain if self.session else _nothing
            )

    def on_place(self, trainer: Any, place: SavePoint) -> None:
        """Save if it is due."""
        if not self._looked:
            self._looked = True
            self._warn_of_refusal(SavePoints.of(trainer))  # now, not when the first save is due
        epochs = place.epochs(self._batches_per_epoch(trainer))
        due = (place.stepped and self._schedule.is_due(epochs)) or place.ending
        if due and self._saved_at != (place.epoch, place.batches):
            self._save(trainer, place, epochs)

    def on_resumed(self, trainer: Any) -> None:
        """The metric that is there has ranked the checkpoint that the run was resumed from."""
        self._schedule.go_back_to(self._epochs_at_start(trainer))  # if its epoch begins again
        if self.monitor is not None:
            self._ranked = trainer.callback_metrics.get(self.monitor)
        self._compare_from_here(trainer)

    def disable(self, trainer: Any, reason: object) -> None:
        """Leave the Trainer as it was, and the run."""
        with contextlib.suppress(Exception):  # this may be what has failed
            self._leave(trainer)
        super().disable(trainer, reason)

    def finish_writing(self, trainer: Any) -> None:
        """Wait for what is being written, with all ranks; a failure is warned of and raises nothing."""
        self._finish_pending(trainer, may_raise=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for what is being written."""
        self._finish_pending(trainer)
        self._end_proof(trainer)
        SavePoints.of(trainer).leave(self)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Wait for what is being written: it may be the last good one."""
        self._leave(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the Trainer as it was."""
        if stage == "fit":
            self._leave(trainer)  # a stop silences `on_train_end`: what is being written then is waited for here

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep what is restored when training starts."""
        warn_of_forgotten_precision(self, trainer, checkpoint)
        if SECTION in checkpoint and trainer.state.fn == "fit":
            SavePoints.of(trainer).resume_from(checkpoint, trainer.global_rank, trainer.world_size)
            self._note_resume(trainer, checkpoint)
        states = checkpoint.get("callbacks", {})
        if self.state_key not in states:  # the interval is part of the key: it is another one now
            ours = [s for key, s in states.items() if key.startswith(f"{type(self).__qualname__}{{")]
            ours = [s for s in ours if (s["monitor"], s["dirpath"]) == (self.monitor, self.dirpath)]
            if len(ours) == 1:
                self.load_state_dict(ours[0])

    # A save

    def _save(self, trainer: Any, place: SavePoint, epochs: Fraction) -> None:
        started = time.perf_counter()
        if self.session is not None:
            self.session.drain()
        self._finish_pending(trainer)
        assert self._saver is not None
        before = self._books()
        candidates = self._candidates(trainer, epochs)
        job = self._enter(trainer, candidates)
        self._saved_at = (place.epoch, place.batches)
        if place.batches == 0:
            self._look_for_monitor(candidates)
        checkpoint, section = self._dump(trainer, place, epochs)
        verdict = look_on_all_ranks(trainer, checkpoint, section)
        self._saver.begin_copy(trainer, checkpoint)  # while it copies, the host does what follows
        if bad := verdict():
            self._restore_books(before)
            self._refuse(trainer, bad)
            return
        pending = PendingSave(job, before, float(epochs), trainer.global_step, trainer.current_epoch)
        self._saver.submit(trainer, pending, checkpoint)
        self._fingerprint_from_here(trainer, section)
        pending.seconds = time.perf_counter() - started
        if not self.async_save:
            self._finish_pending(trainer)

    def _candidates(self, trainer: Any, epochs: Fraction) -> dict[str, Any]:
        """What a file name can hold."""
        max_epochs = trainer.fit_loop.max_epochs
        candidates: dict[str, Any] = {**trainer.callback_metrics}
        candidates["epoch"] = EpochCount.of(epochs, self._schedule.digits, max_epochs)
        candidates["step"] = trainer.global_step
        return candidates

    def _look_for_monitor(self, candidates: dict[str, Any]) -> None:
        """Say it once if what ranks checkpoints has not been logged in a whole epoch."""
        if self.monitor is not None and self.monitor not in candidates and not self._missed_monitor:
            self._missed_monitor = True
            warn(
                f"FractionalCheckpoint(monitor={self.monitor!r}): nothing of that name has been logged, so that no"
                f" checkpoint is ranked and only the newest is kept. Logged: {', '.join(sorted(candidates))}."
            )

    def _dump(self, trainer: Any, place: SavePoint, epochs: Fraction) -> tuple[dict[str, Any], dict[str, Any] | None]:
        with trainer.profiler.profile("save_checkpoint"):
            dump = internals.dump_shards if internals.writes_shards(trainer) else internals.dump_checkpoint
            checkpoint = dump(trainer, self.save_weights_only)
        if self.save_weights_only:
            return checkpoint, None
        # after everybody's `on_save_checkpoint`, which may draw random numbers
        stop_is_due = bool(trainer.should_stop) and not place.ending
        checkpoint[SECTION] = section = make_section(trainer, place, float(epochs), stop_is_due)
        return checkpoint, section

    def _finish_pending(self, trainer: Any, together: bool = True, may_raise: bool = True) -> None:
        """Wait for the save under way; with all ranks here, all learn how it went."""
        pending = None if self._saver is None else self._saver.finish(trainer, together)
        if pending is None:
            return
        if pending.failure is not None:
            self._note_failure(trainer, pending)
            if may_raise and self._failures >= self.max_failures:
                raise RuntimeError(
                    f"FractionalCheckpoint: {self._failures} saves in a row failed, the last one to"
                    f" {pending.job.path}: {pending.failure}"
                ) from pending.error
            warn_of_failure(pending.job.path, pending.failure, self.max_failures - self._failures)
            return
        self._failures = 0
        if pending.job.trouble is not None:
            warn_always(f"FractionalCheckpoint: {pending.job.path} is written, but then: {pending.job.trouble}")
        for path in pending.job.outdated:
            self._scores.pop(path, None)
        if trainer.is_global_zero:
            self._note_success(trainer, pending)

    def _note_success(self, trainer: Any, pending: PendingSave) -> None:
        details = {"path": pending.job.path, "epochs": pending.epochs, "seconds": pending.seconds}
        self._events.write("checkpoint_saved", pending.step, pending.epoch, **details)
        if self.verbose:
            rank_zero_info(f"Epoch {pending.epochs:.4g}, global step {pending.step}: saved {pending.job.path}")
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)

    def _note_failure(self, trainer: Any, pending: PendingSave) -> None:
        self._failures += 1
        self._restore_books(pending.before)
        if trainer.is_global_zero:
            details = {"path": pending.job.path, "error": pending.failure, "in_a_row": self._failures}
            self._events.write("checkpoint_failed", pending.step, pending.epoch, **details)

    def _refuse(self, trainer: Any, bad: list[str]) -> None:
        if trainer.is_global_zero:
            details = {"nonfinite": bad[:10], "nonfinite_tensors": len(bad)}
            self._events.write("checkpoint_refused", trainer.global_step, trainer.current_epoch, **details)
        kept = f"{self._last_checkpoint_saved} stays the newest" if self._last_checkpoint_saved else "there is none yet"
        warn_always(
            f"FractionalCheckpoint: nothing was saved at step {trainer.global_step}: {why_refused(bad)} Of the"
            f" good checkpoints, {kept}."
        )

    def _warn_of_refusal(self, points: SavePoints) -> None:
        if bad := points.finite.unexpected_now():
            warn_always(f"FractionalCheckpoint: nothing will be saved as things are: {why_refused(bad)}")

    # Parts of the above

    def _batches_per_epoch(self, trainer: Any) -> float:
        batches: float = trainer.num_training_batches
        if batches != float("inf"):
            return batches
        if self.steps_per_epoch is None:
            raise MisconfigurationException(
                f"FractionalCheckpoint(every_n_epochs={self._every_n_epochs}) has to know how long an epoch is, and the"
                " training data has no length. Give it steps_per_epoch=..., the optimizer steps of an epoch."
            )
        return int(self.steps_per_epoch * trainer.accumulate_grad_batches)

    def _epochs_at_start(self, trainer: Any) -> Fraction:
        progress = trainer.fit_loop.epoch_progress.current
        inside = trainer.fit_loop.epoch_loop.batch_progress.current.ready if progress.ready > progress.processed else 0
        if SavePoints.of(trainer).ends_a_batch_first:  # what is due with its window has not been saved
            inside -= (inside - 1) % trainer.accumulate_grad_batches + 1
        place = SavePoint(progress.processed, inside, stepped=True, ending=False)
        return place.epochs(self._batches_per_epoch(trainer))

    def _leave(self, trainer: Any) -> None:
        self._end_proof(trainer, all_ranks=False)
        SavePoints.of(trainer).leave(self)
        if self._saver is not None:
            self._finish_pending(trainer, together=False, may_raise=False)  # without the other ranks, which may be gone
            self._saver.close()
            self._saver = None

    @property
    def every_n_epochs(self) -> float:  # type: ignore[override]
        """The interval."""
        return self._every_n_epochs

    def __getstate__(self) -> dict[str, Any]:
        # A copy, here or in another process, has no fit under way. `log` and `log_dict` belong to the module.
        state = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
        return {**state, "_saver": None, "_ranked": None, "_proof": None}


def _above_zero(option: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise MisconfigurationException(
            f"FractionalCheckpoint({option}={value!r}): expected a number above 0, such as 0.25."
        )
    return value


def _nothing() -> None:
    pass
