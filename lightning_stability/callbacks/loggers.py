"""What the callbacks hand to the Trainer's loggers: numbers, and notices of events. No logger fails a run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_stability._compat import is_instance_by_name
from lightning_stability.callbacks.base import warn_always
from lightning_stability.internals import logger_prefix

MLFLOW_TAG_LENGTH = 5000
"""MLflow refuses longer values of tags."""

_FAILED: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def loggers_for_extra_keys(trainer: Any) -> list[Any]:
    """The loggers that can take keys which nobody asked for.

    CSVLogger is left out: its columns may be the input of the user's own scripts. So is what only looks like a logger.
    """
    return [
        logger
        for logger in trainer.loggers
        if is_instance_by_name(logger, "Logger") and not is_instance_by_name(logger, "CSVLogger", "DummyLogger")
    ]


def log_metrics(logger: Any, metrics: dict[str, float], step: int, asked_for: bool) -> None:
    """Log numbers. If the logger raises: one warning, and it gets nothing more from here.

    TensorBoard gets what nobody asked for past its `log_metrics`: who overrides it, or counts its calls, expects what
    the run itself logs and no more.
    """

    def write() -> None:
        if asked_for or not is_instance_by_name(logger, "TensorBoardLogger"):
            logger.log_metrics(metrics, step=step)
        else:
            for key, value in metrics.items():
                logger.experiment.add_scalar(logger_prefix(logger) + key, value, step)

    call_logger(logger, write)


def notify_loggers(trainer: Any, title: str, text: str, key: str, step: int) -> None:
    """Hand a stop, a skip or a change of precision to each logger, in the form that it has for events. Never raises.

    | logger | form |
    |---|---|
    | W&B | an alert, which W&B sends on as the user has set it up, and `summary[key]` |
    | MLflow | the tag `key` |
    | TensorBoard | a text under `key` |

    Others have no such form and get nothing. All ranks may call it; the first one writes. A later notice of the same
    key replaces the earlier one, except in TensorBoard.

    Args:
        title: Names the event, for example "Training stopped". W&B sends alerts of one title at most once a minute.
        key: Where it is filed: letters, digits, `_`, `.` and `/`.
    """
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            call_logger(logger, partial(_notify, logger, title, text, key, step))


def _notify(logger: Any, title: str, text: str, key: str, step: int) -> None:
    if is_instance_by_name(logger, "WandbLogger"):
        logger.experiment.summary[key] = f"step {step}: {text}"
        logger.experiment.alert(title=title, text=text)
    elif is_instance_by_name(logger, "MLFlowLogger"):
        logger.experiment.set_tag(logger.run_id, key, f"step {step}: {text}"[:MLFLOW_TAG_LENGTH])
    elif is_instance_by_name(logger, "TensorBoardLogger"):
        logger.experiment.add_text(logger_prefix(logger) + key, f"{title}: {text}", step)


def call_logger(logger: Any, write: Callable[[], None]) -> None:
    """Have a logger write something. Once it has raised it is not called again: a dead server costs time each call."""
    if _FAILED.get(id(logger)) is logger:
        return
    try:
        write()
    except Exception as error:
        _FAILED[id(logger)] = logger
        warn_always(
            f"{type(logger).__name__} raised {type(error).__name__}: {error}. The run continues; lightning-stability"
            " writes nothing more to this logger. Its events are in events.jsonl, in the run's log folder."
        )
