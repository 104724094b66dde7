"""What the callbacks share: joining the Trainer's runtime at setup and leaving it, however the fit ends."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_stability._compat import Callback, MisconfigurationException, is_instance_by_name
from lightning_stability.health import StepRecord
from lightning_stability.runtime import RunEvents, Runtime


def warn_always(message: str, on_this_rank: bool = False) -> None:
    """Warn, also where the same was said before or warnings are switched off or made errors: this is no advice.

    Args:
        message: What has happened to the run.
        on_this_rank: Whether other ranks than the first shall say it too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        if on_this_rank:
            warnings.warn(message, stacklevel=2)
        else:
            rank_zero_warn(message)


def warn_of_forgotten_precision(callback: Any, trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Warn of a run that had left a precision and is resumed in another one, because PrecisionFallback is not there.

    The first of our callbacks in the Trainer says it. Lightning says only that a callback is missing.

    Args:
        callback: One of ours.
        trainer: The Trainer.
        checkpoint: What is being loaded.
    """
    state = (checkpoint.get("callbacks") or {}).get("PrecisionFallback")
    if not state or state["to"] == str(trainer.precision) or trainer.state.fn != "fit":
        return
    names = ("PrecisionFallback", "RuntimeCallback", "FractionalCheckpoint")
    ours = [other for other in trainer.callbacks if is_instance_by_name(other, *names)]
    if callback is ours[0] and not any(is_instance_by_name(other, "PrecisionFallback") for other in ours):
        warn_always(
            f"This run had fallen back from {state['fallen_from']} to {state['to']} at global step {state['step']}"
            f" ({state['why']}). Without PrecisionFallback it goes on in {trainer.precision}: add the callback, or give"
            f" precision={state['to']!r}."
        )


class RuntimeCallback(Callback):
    """A callback that is a policy of its Trainer's runtime while `fit` runs."""

    read_every = 1
    """How many steps may pass before records are handed over. Several at a time cost less."""

    guards = False
    """Whether bad updates shall be skipped."""

    patience = math.inf
    """How many bad updates in a row the run may go on after."""

    reads_steps = True
    """Whether it has to do with records at all; a run in which nobody has is not measured."""

    automatic = False
    """Whether it came with the environment: what it would refuse then only makes it stand aside."""

    asked_for = True
    """Whether somebody named it, in code, on the command line or in the environment."""

    _runtime: Runtime | None = None

    def is_needed(self, trainer: Any) -> bool:
        """Whether the callback has anything to do under this Trainer; if not it costs nothing."""
        return True

    def on_record(self, record: StepRecord) -> None:
        """Called once for each optimizer step, in order, some time after it."""

    def wants_update(self, logger_step: int) -> bool:
        """Whether the sizes of this step's update and weights shall be measured too."""
        return False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the Trainer's runtime."""
        self._leave()
        if stage == "fit" and self.is_needed(trainer):
            self._runtime = Runtime.attach(trainer, self)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """All callbacks are set up."""
        if self._runtime is not None:
            self._runtime.prepare()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Warn of a precision that the run has left, if nobody else does."""
        warn_of_forgotten_precision(self, trainer, checkpoint)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything is set up and restored: the runtime takes its places."""
        if self._runtime is not None:
            self._runtime.start(pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the runtime."""
        if self._runtime is not None:
            self._runtime.begin_epoch()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Tell the runtime."""
        if self._runtime is not None:
            self._runtime.begin_batch(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell the runtime."""
        if self._runtime is not None:
            self._runtime.end_batch()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Read what is on its way, so that an epoch's numbers are there when it ends."""
        if self._runtime is not None:
            self._runtime.end_epoch()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Read what is on its way, before the loggers are closed."""
        if self._runtime is not None:
            self._runtime.drain()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Read what is on its way, which may say why, and leave: after an exception Lightning calls no teardown."""
        if self._runtime is not None:
            with contextlib.suppress(RuntimeError):  # a device that failed must not hide what made it fail
                self._runtime.drain()
        self._leave()
        RunEvents.of(trainer).failed(trainer, exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the runtime."""
        self._leave()
        if stage == "fit":
            RunEvents.of(trainer).ended(trainer)

    def stand_aside(self, trainer: Any, reason: object) -> None:
        """Leave a run that an automatic callback cannot serve.

        Args:
            trainer: The Trainer.
            reason: Why.
        """
        self._leave()
        take_out(self, trainer, reason)

    def _refuse(self, trainer: Any, message: str) -> None:
        """Refuse a run; an automatic callback only stands aside."""
        if not self.automatic:
            raise MisconfigurationException(message)
        self.stand_aside(trainer, message)

    def _leave(self) -> None:
        if self._runtime is not None:
            self._runtime.detach(self)
            self._runtime = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, here or in another process, has no Trainer yet. `log` and `log_dict` belong to the module:
        # Lightning puts them on every callback while it runs.
        not_ours = ("_runtime", "log", "log_dict")
        return {name: value for name, value in vars(self).items() if name not in not_ours}


def take_out(callback: Any, trainer: Any, reason: object) -> None:
    """Take an automatic callback out of a Trainer, with one line that says why.

    Args:
        callback: The callback.
        trainer: The Trainer.
        reason: Why it cannot serve this run.
    """
    # Another list: Lightning may be on its way through this one.
    trainer.callbacks = [other for other in trainer.callbacks if other is not callback]
    rank_zero_warn(f"lightning-stability: {type(callback).__name__} stands aside in this run: {reason}")
