"""When training started and how it ended: the two events that whoever watches a run from outside needs most."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterable
from typing import Any

from lightning_stability._compat import is_instance_by_name
from lightning_stability.events import EventLog
from lightning_stability.internals import epochs_processed, on_failure_in_processes


class Lifecycle:
    """Writes `training_started` and `training_ended`, once per fit.

    A process that is killed writes no `training_ended`: the process id and host in `training_started` say who to look
    for. An exception is written by each rank that it was raised on, everything else by rank 0.
    """

    def __init__(self) -> None:
        self._events: EventLog | None = None
        self._started_at: float | None = None
        self._stopped_by: str | None = None

    def prepare(self, trainer: Any, events: EventLog) -> None:
        """All callbacks are set up; from now on an exception is recorded, in the validation before training too."""
        if self._events is None:
            self._events, self._started_at, self._stopped_by = events, None, None
            on_failure_in_processes(trainer, lambda exception: self.failed(trainer, exception))

    def started(self, trainer: Any, callbacks: list[Any]) -> None:
        """Training starts: everything is restored."""
        if self._events is None:
            return
        self._started_at = time.monotonic()
        if not trainer.is_global_zero:
            return
        per_epoch = steps_per_epoch(trainer)
        self._events.write(
            "training_started",
            trainer.global_step,
            trainer.current_epoch,
            pid=os.getpid(),
            host=socket.gethostname(),
            world_size=trainer.world_size,
            precision=str(trainer.precision),
            max_epochs=_limit(trainer.max_epochs),
            steps_per_epoch=per_epoch,
            total_steps=_total_steps(trainer, per_epoch),
            resumed_from=None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            callbacks=_names(callbacks),
            unasked=_names(c for c in callbacks if not getattr(c, "asked_for", True)),
        )

    def stopped(self, why: str) -> None:
        """A callback ends the run."""
        self._stopped_by = why

    def ended(self, trainer: Any) -> None:
        """The fit is over, without an exception."""
        if self._events is not None and self._started_at is not None and trainer.is_global_zero:
            status, why = self._how_it_ended(trainer)
            self._write_end(trainer, status=status, why=why)
        self._events = None

    def failed(self, trainer: Any, exception: BaseException) -> None:
        """The fit was ended by an exception, Ctrl-C and SIGTERM included."""
        if self._events is not None:
            said = str(exception).strip().splitlines()
            why = said[0][:500] if said else "interrupted" if isinstance(exception, KeyboardInterrupt) else "no message"
            self._write_end(trainer, status="exception", why=why, exception=type(exception).__name__)
        self._events = None

    def _write_end(self, trainer: Any, **details: Any) -> None:
        assert self._events is not None
        seconds = 0.0 if self._started_at is None else round(time.monotonic() - self._started_at, 3)
        self._events.write("training_ended", trainer.global_step, trainer.current_epoch, seconds=seconds, **details)

    def _how_it_ended(self, trainer: Any) -> tuple[str, str]:
        if self._stopped_by is not None:
            return "stopped", self._stopped_by
        total = _total_steps(trainer, steps_per_epoch(trainer))
        cut_short = trainer.should_stop and (total is None or trainer.global_step < total)
        max_steps, max_epochs = _limit(trainer.max_steps), _limit(trainer.max_epochs)
        if max_steps is not None and trainer.global_step >= max_steps:
            return "finished", f"max_steps={max_steps} reached"
        if cut_short:
            return "stopped", _who_stopped(trainer)
        if max_epochs is not None and epochs_processed(trainer) >= max_epochs:
            return "finished", f"max_epochs={max_epochs} reached"
        return "finished", "there was nothing left to train"


def steps_per_epoch(trainer: Any) -> int | None:
    """Optimizer steps of an epoch; None in manual optimization and for data of unknown length."""
    batches: float = trainer.num_training_batches
    window: int = trainer.accumulate_grad_batches
    if not trainer.lightning_module.automatic_optimization or not math.isfinite(batches) or not batches:
        return None
    return math.ceil(batches / window)


def _total_steps(trainer: Any, per_epoch: int | None) -> int | None:
    if not trainer.lightning_module.automatic_optimization:
        return None  # global_step counts each optimizer's
    max_steps, max_epochs = _limit(trainer.max_steps), _limit(trainer.max_epochs)
    by_epochs = max_epochs * per_epoch if max_epochs is not None and per_epoch is not None else None
    return min((limit for limit in (max_steps, by_epochs) if limit is not None), default=None)


def _names(callbacks: Iterable[Any]) -> list[str]:
    return [type(callback).__name__ for callback in callbacks]


def _limit(value: int | None) -> int | None:
    return None if value is None or value < 0 else int(value)


def _who_stopped(trainer: Any) -> str:
    for callback in trainer.callbacks:
        name = type(callback).__name__
        message = getattr(callback, "stopping_reason_message", None)
        if is_instance_by_name(callback, "EarlyStopping") and message:
            return f"{name}: {message.removesuffix(' Signaling Trainer to stop.')}"
        remaining = callback.time_remaining() if is_instance_by_name(callback, "Timer") else None
        if remaining is not None and remaining <= 0:
            return f"{name}: max_time reached"
    return "trainer.should_stop was set"
