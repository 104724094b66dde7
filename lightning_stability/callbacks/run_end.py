"""Ending a run from within a callback: the loops end at once, no checkpoint callback saves, good weights are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_stability.callbacks.base import warn_always
from lightning_stability.callbacks.incident import listed
from lightning_stability.checkpointing.loops import SavePoint, SavePoints
from lightning_stability.checkpointing.section import StopCheckpoint
from lightning_stability.checkpointing.stopping import FILE_NAME, EndOfLoop, SilencedCheckpoints, checkpoint_folder


class RunEnd:
    """What ends one fit. Until it does this costs nothing.

    Args:
        trainer: The Trainer, in `on_train_start`.
        after_a_stop: Whether the run resumes from the checkpoint of a stop.
    """

    def __init__(self, trainer: Any, after_a_stop: bool) -> None:
        self._trainer = trainer
        if after_a_stop:
            SavePoints.of(trainer).listen(self, saves=False)
        self._checkpoint = StopCheckpoint(trainer)
        self._silenced: SilencedCheckpoints | None = None
        self._loop_ends: list[EndOfLoop] = []

    def silence_checkpoints(self) -> None:
        """No checkpoint callback saves any more: Lightning ends a run with a save that would replace the last good."""
        self._silenced = self._silenced or SilencedCheckpoints(self._trainer)

    def end_loops(self, instead: Callable[[], None]) -> None:
        """Both loops end, whatever `min_steps` and `min_epochs` say, before a validation and before any hook at the end
        of an epoch, which may want metrics that are not there.

        Args:
            instead: Called there; it raises.
        """
        if not self._loop_ends:
            loops = self._trainer.fit_loop.epoch_loop, self._trainer.fit_loop
            self._loop_ends = [EndOfLoop(loop, instead) for loop in loops]

    def keep_good_weights(self, stop_was_due: bool) -> str | None:
        """Save what was trained since the last checkpoint: it is finite, and otherwise lost. Returns the path."""
        folder = checkpoint_folder(self._trainer)
        if folder is None:
            return None
        path = str(self._trainer.strategy.broadcast(f"{folder}/{FILE_NAME}"))
        try:
            nonfinite = self._checkpoint.write(path, stop_was_due)
        except Exception as error:  # whatever it is, it must not hide why the run ended
            warn_always(f"NaNEarlyStop: {path} could not be written ({error!r}); the run's other checkpoints stand.")
            return None
        if nonfinite:
            warn_always(f"NaNEarlyStop: {path} was not written: {listed(nonfinite)} would not be finite in it.")
            return None
        return path

    def on_place(self, trainer: Any, place: SavePoint) -> None:
        """Nothing is saved here: what is listened for is where a resumed run begins."""

    def on_resumed(self, trainer: Any) -> None:
        """It is where it was."""

    def restore(self) -> None:
        """Let the loops end by themselves, and checkpoint callbacks save again."""
        SavePoints.of(self._trainer).leave(self)
        for end in self._loop_ends:
            end.restore()
        self._loop_ends = []
        if self._silenced is not None:
            self._silenced.restore()
            self._silenced = None
