"""Numbers of JSON files, in which one that is not finite is a word."""

from __future__ import annotations

import math
from typing import Any


def as_number(value: Any) -> float:
    """A number of a JSON file; nan for anything else.

    Example:
        >>> as_number("inf"), as_number(None)
        (inf, nan)
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def is_wide_ranging(values: list[float]) -> bool:
    """Whether values are better drawn on a log scale.

    Args:
        values: Those that are not finite do not count.

    Example:
        >>> is_wide_ranging([1.0, 2.0]), is_wide_ranging([0.01, 1000.0])
        (False, True)
    """
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 300 * min(finite)
