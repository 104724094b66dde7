"""Metrics that only bad batches fed are absent after an epoch: who waits for one of them shall not fail for it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lightning_stability._compat import is_instance_by_name
from lightning_stability.internals import Overrides


class AbsentMetrics:
    """Has `EarlyStopping` and `ReduceLROnPlateau` pass over an epoch whose metric was left out."""

    def __init__(self) -> None:
        self._overrides = Overrides()

    def leave_out(self, trainer: Any, keys: Collection[str]) -> None:
        """The epoch ends without these.

        Args:
            trainer: The Trainer, in `on_train_epoch_end`.
            keys: As `MetricUndo.take_left_out` returns them.
        """
        if not keys:
            return
        for key in keys & trainer.callback_metrics.keys():
            if not bool(trainer.callback_metrics[key].isfinite().all()):  # what a bad step logged by the step
                del trainer.callback_metrics[key]
        callbacks = [callback for callback in trainer.callbacks if is_instance_by_name(callback, "EarlyStopping")]
        for waiting in (*callbacks, *trainer.lr_scheduler_configs):
            if waiting.monitor in keys and waiting.strict:
                self._overrides.set(waiting, "strict", False)

    def restore(self) -> None:
        """Another epoch begins, or the fit is over: a metric that nobody logs is an error again."""
        self._overrides.restore()
