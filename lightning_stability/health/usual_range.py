"""The usual range of a number that a run gives once a step, such as its loss, and the limit beyond which it spikes."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

ENOUGH = 40
"""With fewer values nothing is known of the range, and there is no limit."""
REFRESH = 8
"""The limit is computed anew after so many values."""
TAIL = 0.96
"""This quantile of the window says how far a healthy run strays; 5 spikes of 128 do not move it much."""
TAIL_FACTOR = 3.0
"""A limit is at least so many times as far from the median as that quantile is."""
LEAST_FACTOR = 1.2
"""And at least this multiple of the median, for a number that hardly varies."""


class UsualRange:
    """The limit above which a value is far outside of what the last ones were; robust, so that no spike widens it.

    The limit is `sigma` standard deviations above the median, where the standard deviation is 1.4826 times the median
    distance from the median (MAD), as it is for a normal distribution. Where the values have a heavy tail, the limit
    lies further out. Values that are not finite are left out.

    Args:
        sigma: How many standard deviations.
        window: How many of the newest values count.
        of_logs: Whether the range is that of the logarithms: for what is positive and varies by factors.

    Example:
        >>> usual = UsualRange(sigma=8.0, window=128)
        >>> for value in range(128):
        ...     usual.add(1.0 + 0.01 * (value % 3))
        >>> usual.limit < 1.3
        True
        >>> usual.add(1000.0), usual.add(float("nan"))
        (None, None)
        >>> usual.limit < 1.3
        True
    """

    def __init__(self, sigma: float = 8.0, window: int = 128, of_logs: bool = False) -> None:
        self.sigma = sigma
        self.limit = math.inf
        self.median = math.nan
        """NaN while too little is known."""
        self._of_logs = of_logs
        self._values: deque[float] = deque(maxlen=window)
        self._since = 0
        self._enough = min(ENOUGH, window)

    def add(self, value: float) -> None:
        """Take in the value of a step that was applied."""
        if not math.isfinite(value) or (self._of_logs and value <= 0.0):
            return
        self._values.append(value)
        self._since += 1
        if len(self._values) >= self._enough and (self._since >= REFRESH or self.limit == math.inf):
            self._since = 0
            self._set_limit()

    def forget(self) -> None:
        """Another range begins: the values so far say nothing of it."""
        self._values.clear()
        self._since, self.limit, self.median = 0, math.inf, math.nan

    def _set_limit(self) -> None:
        values = np.array(self._values)
        if self._of_logs:
            values = np.log(values)
        median, tail = np.quantile(values, (0.5, TAIL))
        deviation = 1.4826 * float(np.median(np.abs(values - median)))
        distance = max(self.sigma * deviation, TAIL_FACTOR * float(tail - median))
        if self._of_logs:
            self.median = math.exp(median)
            log_limit = median + max(distance, math.log(LEAST_FACTOR))
            self.limit = math.exp(log_limit) if log_limit < 700.0 else math.inf
        else:
            self.median = float(median)
            self.limit = float(median) + max(distance, (LEAST_FACTOR - 1.0) * abs(float(median)), 1e-12)

    def state_dict(self) -> dict[str, Any]:
        """What the next limit depends on."""
        return {"values": list(self._values), "since": self._since, "limit": self.limit, "median": self.median}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; with a shorter window from its newest values."""
        self._values.clear()
        self._values.extend(state["values"])
        self._since, self.limit, self.median = state["since"], state["limit"], state["median"]
