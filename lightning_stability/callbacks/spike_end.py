"""How SpikeRecovery ends a run that going back has not helped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from lightning_stability import internals
from lightning_stability._compat import is_instance_by_name
from lightning_stability.callbacks.base import warn_always
from lightning_stability.callbacks.incident import NonFiniteError, listed
from lightning_stability.callbacks.loggers import notify_loggers
from lightning_stability.callbacks.run_end import RunEnd
from lightning_stability.callbacks.spike_messages import end_message
from lightning_stability.checkpointing.loops import SavePoint, SavePoints
from lightning_stability.checkpointing.section import is_of_a_stop
from lightning_stability.checkpointing.stopping import newest_checkpoint
from lightning_stability.runtime import Session


@dataclass(frozen=True)
class Trouble:
    """What makes a run go back.

    Attributes:
        what: In a word, as in `NonFiniteError.what`, or `"spike"`.
        why: In a sentence, without a full stop.
        rates: Learning rates of the step that showed it; empty if it was none.
    """

    what: str
    why: str
    rates: tuple[float, ...] = ()


class ResumeAfterEnd:
    """Continues right after the batch that a run was ended with, where no other callback does."""

    def __init__(self) -> None:
        self._is_needed = False

    def load(self, trainer: Any, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is being loaded."""
        if trainer.state.fn != "fit" or trainer.fast_dev_run or not is_of_a_stop(checkpoint):
            return
        others = ("FractionalCheckpoint", "NaNEarlyStop")
        if not any(is_instance_by_name(other, *others) for other in trainer.callbacks):
            SavePoints.of(trainer).resume_from(checkpoint, trainer.global_rank, trainer.world_size)
            self._is_needed = True

    def start(self, trainer: Any) -> None:
        """Training starts."""
        if self._is_needed:
            SavePoints.of(trainer).listen(self, saves=False)

    def leave(self, trainer: Any) -> None:
        """The fit is over."""
        SavePoints.of(trainer).leave(self)

    def on_place(self, trainer: Any, place: SavePoint) -> None:
        """Nothing: what is listened for is where a resumed run begins."""

    def on_resumed(self, trainer: Any) -> None:
        """Nothing."""

    def on_failure(self, trainer: Any, error: Exception) -> bool:
        """The run cannot continue without the save points."""
        return False


class SpikeEnd:
    """Ends one fit as NaNEarlyStop does. Until it is due this costs nothing.

    Args:
        trainer: The Trainer, in `on_train_start`.
    """

    def __init__(self, trainer: Any) -> None:
        self._run_end = RunEnd(trainer, after_a_stop=False)
        self._trainer = trainer
        self._trouble: Trouble | None = None
        self._where, self._to_step, self._rewinds, self._attempts = "", 0, 0, 0
        self._keeps_weights = False
        self._message = ""
        self.is_saving = False
        """Whether it is writing the good weights itself."""

    @property
    def is_due(self) -> bool:
        """Whether the run is to end."""
        return self._trouble is not None

    def begin(
        self, trouble: Trouble, where: str, to_step: int, rewinds: int, attempts: int, keeps_weights: bool
    ) -> None:
        """The run is to end as soon as the hooks of the batch are through.

        Args:
            where: Epoch, batch and step.
            to_step: The step whose state has been restored.
            rewinds: How often the run has gone back.
            attempts: How often at this place.
            keeps_weights: Whether anything was trained that is worth a checkpoint.
        """
        self._trouble, self._where, self._to_step = trouble, where, to_step
        self._rewinds, self._attempts, self._keeps_weights = rewinds, attempts, keeps_weights

    def end_loops(self, session: Session) -> None:
        """Leave the loops before a validation, a save or an epoch's end."""
        self._run_end.silence_checkpoints()
        self._run_end.end_loops(lambda: self.stop(session))

    def stop(self, session: Session, inside_save: bool = False) -> NoReturn:
        """Announce the end, once, and leave the loop; inside a save only leave."""
        assert self._trouble is not None
        if not inside_save and not self._message:
            self._announce(session, self._trouble)
        trainer = self._trainer
        raises = (is_instance_by_name(other, "NaNEarlyStop") and other.action == "raise" for other in trainer.callbacks)
        if self._message and any(raises):
            raise NonFiniteError(self._message, self._trouble.what, trainer.global_step, trainer.current_epoch)
        self.end_loops(session)
        raise StopIteration

    def restore(self) -> None:
        """Let the loops end by themselves again."""
        self._run_end.restore()

    def _announce(self, session: Session, trouble: Trouble) -> None:
        trainer = self._trainer
        stop_was_due, trainer.should_stop = trainer.should_stop, True
        session.end(f"SpikeRecovery: {trouble.why}")
        session.drain()
        self.is_saving = True
        kept = self._run_end.keep_good_weights(stop_was_due) if self._keeps_weights else None
        checkpoint = kept or newest_checkpoint(trainer)
        self._run_end.silence_checkpoints()
        _, lost = session.restore_contents()
        step, epoch, counts = trainer.global_step, trainer.current_epoch, session.counts
        if trainer.is_global_zero:
            details = {"what": trouble.what, "why": trouble.why, "rewinds": self._rewinds, "checkpoint": checkpoint}
            session.events.write("training_stopped", step, epoch, by="SpikeRecovery", skipped=counts.skipped, **details)
        self._message = end_message(
            trouble.why, self._where, self._attempts, self._to_step, trouble.rates, listed(lost), counts, checkpoint
        )
        warn_always(self._message)
        key = "lightning_stability/stopped"
        notify_loggers(trainer, "Training stopped", self._message, key, internals.logger_step(trainer))
