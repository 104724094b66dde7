"""Private names of loggers."""

from __future__ import annotations

from typing import Any


def logger_prefix(logger: Any) -> str:
    """What a logger puts in front of each key; its `log_metrics` does, and who goes past it has to."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
