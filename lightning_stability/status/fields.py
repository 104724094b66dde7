"""What the fields of events can be relied on for: another version, or another program, may have written them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_stability.events import LARGEST, read_events

UNKNOWN = "unknown"


class Event(dict[str, Any]):
    """An event. `event["why"]` is "unknown" where it does not say why, and `event.get("why")` is None.

    The fields that are counted with or put into sentences are of their type: one that is not is left out.
    `epoch` and `time` are nan, and `rank` is 0, where the event does not say.
    """

    def __missing__(self, name: str) -> str:
        return UNKNOWN


def read_run(folder: Path) -> tuple[list[Event], int]:
    """A run's events, oldest first, and how many lines are no events."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lines that cannot be read: they are counted
        events = read_events(folder)
    return [typed(event) for event in events], events.unreadable


def typed(event: dict[str, Any]) -> Event:
    """An event, less the fields that are not of their type.

    Args:
        event: As `read_events` gives it.

    Example:
        >>> event = typed({"event": "checkpoint_saved", "step": 3, "path": ["a", "list"]})
        >>> event["path"], event.get("path"), event["rank"]
        ('unknown', None, 0)
    """
    return Event({"epoch": math.nan, "time": math.nan, "rank": 0} | _known(event))


def moment(seconds: float, form: str) -> str:
    """A time as people write it.

    Args:
        seconds: Since 1970.
        form: What of it, in the words of `strftime`.

    Example:
        >>> moment(float("nan"), "%H:%M")
        'unknown time'
    """
    try:
        return f"{datetime.fromtimestamp(seconds):{form}}"
    except (ValueError, OverflowError, OSError):
        return "unknown time"


def counted(value: Any) -> str:
    """A number with commas; what is no number stays as it is."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_count(abs(value) if isinstance(value, int) else value) or value in _WORDS


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


_WORDS = ("nan", "inf", "-inf")
_KINDS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (_is_text, "by why what path host precision precision_from precision_to status exception resumed_from checkpoint"),
    (_is_text, "action cause origin tensor reason layer side"),
    (_is_count, "pid world_size max_epochs steps_per_epoch total_steps batch_idx batches skipped of others"),
    (_is_count, "from_step to_step"),
    (_is_number, "loss grad_norm loss_scale learning_rate deviation factor"),
    (_is_list, "callbacks findings far_from_unit_scale"),
)
_TYPES = {name: check for check, names in _KINDS for name in names.split()}


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in fields.items() if name not in _TYPES or _TYPES[name](value)}
    for name in kept.keys() & {"findings", "far_from_unit_scale"}:
        kept[name] = [Event(_known(inner)) for inner in kept[name] if isinstance(inner, dict)]
    return kept
