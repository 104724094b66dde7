"""Whether a series of numbers rises or falls, said so that one outlier does not decide it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

WINDOW = 60
"""How many of the newest values are looked at."""
_LEAST = 6
_STEADY = 1.25


def trend(values: Sequence[float]) -> float | None:
    """By what factor a series has grown: the median of its newest third over the median of its oldest third.

    Medians are those of the logarithms, so that a series read backwards has the inverse trend. Values that are not
    finite or not above 0 do not count.

    Args:
        values: Oldest first; the newest `WINDOW` that count are looked at.

    Returns:
        The factor; None if fewer than six values count.

    Example:
        >>> trend([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])
        2.0
    """
    logs = [math.log(value) for value in values if math.isfinite(value) and value > 0][-WINDOW:]
    if len(logs) < _LEAST:
        return None
    third = len(logs) // 3
    return math.exp(median(logs[-third:]) - median(logs[:third]))


def in_words(factor: float) -> str:
    """A trend as people say it.

    Args:
        factor: What `trend` returned.

    Example:
        >>> in_words(1.1), in_words(3.0), in_words(0.5)
        ('steady', 'rising, x3', 'falling, x0.5')
    """
    if 1 / _STEADY <= factor <= _STEADY:
        return "steady"
    return f"{'rising' if factor > 1 else 'falling'}, x{factor:.3g}"
