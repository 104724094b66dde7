"""NaNEarlyStop: a bad number never lands, and the run ends before it makes anything worse."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NoReturn

from pytorch_lightning.utilities.rank_zero import rank_zero_info

from lightning_stability._compat import is_instance_by_name
from lightning_stability.callbacks.base import StabilityCallback, warn_always
from lightning_stability.callbacks.incident import (
    Incident,
    NonFiniteError,
    listed,
    loss_incident,
    metric_incident,
    poisoned_attributes,
    where_nonfinite,
)
from lightning_stability.callbacks.loggers import call_logger, notify_loggers
from lightning_stability.callbacks.run_end import RunEnd
from lightning_stability.callbacks.stop_message import stop_message, summary
from lightning_stability.checkpointing.loops import SavePoints
from lightning_stability.checkpointing.section import is_of_a_stop
from lightning_stability.checkpointing.stopping import (
    newest_checkpoint,
)
from lightning_stability.health import StepRecord
from lightning_stability.health.values import named_tensors, nonfinite_names
from lightning_stability.internals import batch_index, validation_is_due, window_is_open
from lightning_stability.runtime import BadStep, Order, Outcome
from lightning_stability.runtime.counts import Counts
from lightning_stability.runtime.trainers import why_gradients_are_hidden

MOST_BATCHES = 8
"""Batches of an accumulation window up to which they are kept, so that a bad step can be explained."""


class NaNEarlyStop(StabilityCallback):
    """Skips every update that is not finite, and ends the run when there are too many.

    A step is bad when its loss, a gradient or a buffer is not finite. Gradients whose squares overflow fp32 count,
    since Adam's second moment would overflow with them. The update does not reach weights or optimizer state. What a
    forward pass with a bad loss wrote is restored: buffers, metrics logged with `on_epoch=True`, and the module's
    torchmetrics. Learning-rate schedule, `global_step` and random numbers continue, as when GradScaler skips an
    update. With accumulation no update is made of the whole window.

    With torch's fused optimizers the device decides, and nothing waits for it. With others the host reads one number
    per step, and a line at the start says so.

    What GradScaler answers by halving its scale is counted and is no incident. It is one if the scale falls below 1,
    or if more than 20 updates in a row are skipped (`Session.min_loss_scale`, `Session.max_consecutive_skips`).

    After a stop no validation runs, and no checkpoint callback saves any more. One message says what became
    non-finite, where, and how to resume. If updates were made since the last checkpoint, the good weights are kept in
    `nan_early_stop.ckpt` beside the others. A run that is resumed from it continues right after the bad batch.

    Logged when an update is skipped:

    | key | meaning |
    |---|---|
    | `skipped_updates` | updates skipped so far, by GradScaler or by the guard |

    Args:
        patience: How many bad updates in a row to skip; the next one ends the run.
        action: `"stop"` ends `fit` as if it were done; `"raise"` raises `NonFiniteError`.
        monitor: Logged metrics to watch as well, for example `"val_loss"`: one that is not finite after a validation
            or an epoch ends the run.

    Raises:
        MisconfigurationException: If an option is out of range; when training starts, if trained weights are not
            finite, if the optimizer cannot be guarded (LBFGS), or if its eps is 0 in fp16 weights.
        NonFiniteError: With `action="raise"`.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> from lightning_stability import NaNEarlyStop
        >>> trainer = Trainer(max_steps=100, callbacks=[NaNEarlyStop()], logger=False)
    """

    order = Order.STOP
    guards = True

    def __init__(
        self,
        patience: int = 2,
        action: Literal["stop", "raise"] = "stop",
        monitor: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self._require_number(0, patience=patience)
        self._require_one_of("stop", "raise", action=action)
        self.patience = patience
        self.action = action
        self.monitor = self._names(monitor=monitor)
        self._counts = Counts()
        self._watches_loss_alone = False
        self._updates_at_save = 0
        self._clear()

    def _clear(self) -> None:
        self._incident: Incident | None = None
        self._announced = False
        self._summarised = False
        self._run_end: RunEnd | None = None
        self._goes_on_after_a_stop = False
        self._message = ""
        self._metrics_seen: set[str] = set()
        self._newest: Incident | None = None
        self._saw_finite_loss = False
        self._origin: str | None = None
        self._first_incident: str | None = None
        self._last_incident: str | None = None

    # A fit.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """What an earlier fit counted was that fit's."""
        if stage == "fit":
            self._clear()
            self._counts = Counts() if self.session is None else self.session.counts  # a checkpoint's are loaded later
            if self.session is not None and self.guards and not self.automatic:
                self.session.subscribe(self.on_bad_step, MOST_BATCHES)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse weights that are not finite: nothing good can come of them."""
        self._updates_at_save = self._counts.updates
        bad = _nonfinite_weights(pl_module)
        # Each rank may hold other shards of them, and all have to decide alike.
        if trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            where = listed(bad) if bad else "on another rank"
            self._refuse_run(
                trainer,
                f"NaNEarlyStop: trained weights are not finite before the first step: {where}. Expected finite"
                " values; check how they are initialised or which checkpoint they were loaded from.",
            )
            return
        self._run_end = RunEnd(trainer, self._goes_on_after_a_stop, self.on_failure)

    def on_record(self, record: StepRecord) -> None:
        """One bad step too many ends the run; each one is said."""
        if record.outcome not in (Outcome.ORDINARY_SKIP, Outcome.BAD):
            return
        assert self.session is not None
        trainer = self.session.trainer
        if trainer.is_global_zero and (record.outcome == Outcome.BAD or self.asked_for):
            metrics = {"skipped_updates": float(self._counts.skipped)}
            for logger in trainer.loggers:
                call_logger(logger, partial(logger.log_metrics, metrics, step=record.logger_step))
        if record.outcome == Outcome.BAD:
            self._on_bad_step(record)

    def _join(self, trainer: Any, stage: str) -> None:
        """Where the gradients are hidden (DeepSpeed, XLA), watch the loss alone: nothing can be skipped there."""
        hidden = why_gradients_are_hidden(trainer) is not None
        self._watches_loss_alone = hidden and stage == "fit"
        self.guards = self.reads_steps = not hidden
        super()._join(trainer, stage)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Stop here if the validation in between said so."""
        self._stop_if_due(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop when the batch's hooks are through, before a validation or a checkpoint."""
        if self._watches_loss_alone:
            self._incident = self._incident or loss_incident(trainer, outputs)
        never_finite = self._newest is not None and not self._counts.updates and not self._saw_finite_loss
        before_validation = never_finite and validation_is_due(trainer)
        if before_validation:  # of a net that was never finite, on weights as they were made
            self._incident = self._incident or self._newest
        if self._incident is not None and (before_validation or not window_is_open(trainer)):
            self._silence_checkpoints()
            self._end_loops(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the monitored metrics."""
        if not trainer.sanity_checking:
            self._look_at_metrics(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the monitored metrics; leave the loop if the run has ended."""
        self._look_at_metrics(trainer)
        self._stop_if_due(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """No checkpoint is written once the run is to end; this one is refused before it touches the disk."""
        if self.session is not None and not self._announced:
            self._stop_if_due(trainer, may_save=False)  # we are inside of a save
        self._updates_at_save = self._counts.updates

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what became of all updates."""
        self._summarise()

    def on_session_end(self, exception: BaseException | None) -> None:
        """Say what became of all updates; another callback may have failed over the bad batch."""
        assert self.session is not None
        trainer = self.session.trainer
        if exception is not None:
            if self._incident is not None and not self._announced and trainer.world_size == 1:
                self._announced = True  # of several ranks one alone, maybe
                with contextlib.suppress(RuntimeError):  # a device that failed must not hide what made it fail
                    self._announce(trainer, self._incident)
            self._summarise()
        if self._run_end is not None:
            self._run_end.restore()
            self._run_end = None

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on right after the batch that a run was ended with."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn != "fit" or trainer.fast_dev_run or not is_of_a_stop(checkpoint):
            return
        if not any(is_instance_by_name(other, "FractionalCheckpoint") for other in trainer.callbacks):  # it does so too
            SavePoints.of(trainer).resume_from(checkpoint, trainer.global_rank, trainer.world_size)
            self._goes_on_after_a_stop = True

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        if self.session is not None:
            self.session.drain()
        counts = {**self._counts.state_dict(), "bad_in_a_row": {}}
        return {**counts, "first_incident": self._first_incident, "last_incident": self._last_incident}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting from a checkpoint."""
        self._counts.load_state_dict(state_dict)
        self._first_incident, self._last_incident = state_dict["first_incident"], state_dict["last_incident"]

    # Bad steps.

    def _on_bad_step(self, record: StepRecord) -> None:
        assert self.session is not None
        trainer = self.session.trainer
        incident = Incident.of(record, self.session.recent_batch(record), several_ranks=trainer.world_size > 1)
        in_a_row = self._counts.bad_in_a_row[record.optimizer]
        if in_a_row > 1 and (attributes := poisoned_attributes(trainer.lightning_module)):
            incident.why += f"; the attribute {listed(attributes)} of the module holds non-finite values, which no skip"
            incident.why += " restores: register it as a buffer, or reset it"
        self._newest = incident
        self._saw_finite_loss |= any(math.isfinite(loss) for loss in record.batch_losses)
        self._first_incident = self._first_incident or incident.place
        self._last_incident = incident.place
        if record.not_restored:
            self._add_lost(incident, record.not_restored)
        if self.session.restores_next:
            return  # SpikeRecovery answers, and says so
        if in_a_row > self.patience or record.not_restored:  # (no later step can be good either)
            self._incident = self._incident or incident
            self.session.end()
        elif trainer.is_global_zero:
            row = f", {in_a_row} in a row" if in_a_row > 1 else ""
            what = f"an update was skipped{row}: {incident.why} ({incident.place})."
            then = "make it go back" if self.session.dispatch.rewinds else "end the run"
            warn_always(f"NaNEarlyStop: {what} More than {int(self.session.dispatch.patience)} in a row {then}.")
            notify_loggers(trainer, "Update skipped", what, "lightning_stability/skipped", record.logger_step)

    def on_bad_step(self, bad: BadStep) -> None:
        """Before the run ends: run the step again in memory, and find where its first non-finite value was made."""
        in_a_row = self._counts.bad_in_a_row[bad.record.optimizer] + 1
        may_end = in_a_row > self.patience or not self._counts.updates
        if may_end and self._origin is None:
            from lightning_stability.callbacks.incident_report import explain  # (it loads what few runs need)

            self._origin = explain(bad)

    def skips_exception(self, exception: Exception, batch: Any) -> bool:
        """Say which values of the batch, or which weights, are not finite; skip a batch that is, with patience left."""
        assert self.session is not None
        trainer = self.session.trainer
        bad_input = nonfinite_names(named_tensors(batch))
        bad_weights = _nonfinite_weights(trainer.lightning_module)
        if not bad_input and not bad_weights:
            return False
        skips = bool(bad_input) and not bad_weights and self._counts.bad_in_a_row[0] < self.patience
        if skips and self.session.can_skip_a_batch:
            return True  # said with the update that is skipped for it
        where = f"epoch {trainer.current_epoch}, batch {batch_index(trainer)}, global step {trainer.global_step}"
        weights = f"weights: {listed(bad_weights)}" if bad_weights else ""
        held = "; ".join(filter(None, [where_nonfinite(batch), weights]))
        what = f"a training step raised {type(exception).__name__} at {where}; non-finite values are in {held}."
        warn_always(f"NaNEarlyStop: {what}", on_this_rank=True)
        return False

    # Metrics.

    def _look_at_metrics(self, trainer: Any) -> None:
        if self._incident is not None or not self.monitor:
            return
        self._metrics_seen |= set(self.monitor) & set(trainer.callback_metrics)
        self._incident = metric_incident(trainer, self.monitor)
        if self._incident is not None:
            self._silence_checkpoints()  # this very moment's save would rank it as best

    # The stop.

    def _stop_if_due(self, trainer: Any, may_save: bool = True) -> None:
        if self._incident is None:
            return
        if may_save and not self._announced:
            self._announced = True
            self._announce(trainer, self._incident)
        if self.action == "raise" and self._announced:
            self._raise(self._incident)
        self._end_loops(trainer)
        raise StopIteration

    def _announce(self, trainer: Any, incident: Incident) -> None:
        assert self.session is not None
        stop_was_due, trainer.should_stop = trainer.should_stop, True
        self.session.end(f"NaNEarlyStop: {incident.why}")
        self.session.drain()  # no bad batch may be left in the metrics
        keeps = self._run_end is not None and self._counts.updates > self._updates_at_save and incident.what != "metric"
        kept = self._run_end.keep_good_weights(stop_was_due) if self._run_end is not None and keeps else None
        checkpoint = kept or newest_checkpoint(trainer)
        self._silence_checkpoints()
        _, lost = self.session.restore_contents()  # (a message claims only what was looked at)
        if lost and incident.what != "weight":
            self._add_lost(incident, lost)
        if trainer.is_global_zero:
            self.session.events.write(
                "training_stopped",
                incident.step,
                incident.epoch,
                by="NaNEarlyStop",
                what=incident.what,
                why=incident.why,
                batch_idx=incident.batch_idx,
                bad_rank=incident.rank,
                skipped=self._counts.skipped,
                held=self._counts.outcomes[Outcome.HELD],
                checkpoint=checkpoint,
            )
        self._message = stop_message(
            incident, self._origin, self._counts, checkpoint, int(self.patience), self.automatic
        )
        if self.action == "stop":
            warn_always(self._message)
        notify_loggers(trainer, "Training stopped", self._message, "lightning_stability/stopped", incident.step)
        for logger in trainer.loggers:  # a tracker that fails must not hide why the run ended
            call_logger(logger, logger.save)

    def _silence_checkpoints(self) -> None:
        if self._run_end is not None:
            self._run_end.silence_checkpoints()

    def _end_loops(self, trainer: Any) -> None:
        if self._run_end is not None:
            self._run_end.end_loops(lambda: self._stop_if_due(trainer))

    def _raise(self, incident: Incident) -> NoReturn:
        raise NonFiniteError(self._message, incident.what, incident.step, incident.epoch, incident.batch_idx)

    def _add_lost(self, incident: Incident, lost: list[str]) -> None:
        """A skipped step makes no weight non-finite; if one is, an earlier update or other code has made it so."""
        incident.what = "weight"
        incident.why += (
            f"; {listed(lost)} {'is' if len(lost) == 1 else 'are'} not finite: an update before this step made"
            f" {'it' if len(lost) == 1 else 'them'} so, or code outside of the optimizer"
        )

    def on_nonfinite_contents(self, restored: list[str], lost: list[str], all_ranks: bool) -> None:
        """Say what was restored; what was not ends the run."""
        assert self.session is not None
        trainer = self.session.trainer
        where = f"epoch {trainer.current_epoch}, global step {trainer.global_step}"
        if restored:
            warn_always(
                f"NaNEarlyStop: {listed(restored)} became non-finite outside of the optimizer ({where}); restored from"
                " the newest good copy.",
                on_this_rank=True,
            )
        if lost and all_ranks and self._incident is None and not self.session.restores_next:
            why = f"{listed(lost)} became non-finite outside of a bad step, and no copy of it is kept"
            self._incident = Incident("weight", why, trainer.global_step, trainer.current_epoch, -1, None)

    def _summarise(self) -> None:
        if self._summarised or (self.automatic and not self._counts.skipped):
            return
        self._summarised = True
        rank_zero_info(f"NaNEarlyStop: {summary(self._counts, self._first_incident, self._last_incident)}.")
        never = sorted(set(self.monitor) - self._metrics_seen)
        if never and self._incident is None:
            warn_always(f"NaNEarlyStop(monitor={never}): never logged in this fit, so nobody watched it.")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run_end": None}


def _nonfinite_weights(module: Any) -> list[str]:
    return nonfinite_names((name, p) for name, p in module.named_parameters() if p.requires_grad)
