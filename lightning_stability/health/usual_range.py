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
LEVEL = 32
"""The level is the median of so many of the newest values, so that a loss that falls does not widen its range."""
TAIL, TAIL_FACTOR = 0.96, 3.0
"""This quantile of the distances from the level says how far a healthy run strays: a limit is at least so many times as
far. The 5 largest of 128 do not move it."""
LEAST_FACTOR = 1.1
"""And at least this multiple of the level, for a number that hardly varies."""


class UsualRange:
    """The limit above which a value is far outside of what the last ones were; robust, so that no spike widens it.

    The limit is `sigma` standard deviations above the level, the median of the newest values. Distances are those of
    the values from the level of their time. Their standard deviation is 1.4826 times what lies between their median and
    their upper quartile, as it is for a normal distribution. Where they have a heavy tail, the limit lies further out.
    Values that are not finite are left out.

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
        self._level: float | None = None
        self._of_logs = of_logs
        self._newest: deque[float] = deque(maxlen=min(LEVEL, window))
        self._distances: deque[float] = deque(maxlen=window)  # from the level of their time
        self._since = 0
        self._enough = min(ENOUGH, window)

    @property
    def level(self) -> float:
        """What the values usually are; NaN while too little is known."""
        if self._level is None:
            return math.nan
        return math.exp(self._level) if self._of_logs else self._level

    def towards_limit(self, share: float) -> float:
        """What has gone so far from the level to the limit; infinite while there is none."""
        if self._level is None or self.limit == math.inf:
            return math.inf
        if self._of_logs:
            return math.exp(self._level + share * (math.log(self.limit) - self._level))
        return self._level + share * (self.limit - self._level)

    def add(self, value: float) -> None:
        """Take in the value of a step that was applied."""
        if not math.isfinite(value) or (self._of_logs and value <= 0.0):
            return
        value = math.log(value) if self._of_logs else value
        self._newest.append(value)
        if self._level is not None:
            self._distances.append(value - self._level)
        self._since += 1
        if self._since >= REFRESH:
            self._since = 0
            self._level = float(np.median(self._newest))
            if len(self._distances) + REFRESH >= self._enough:
                self._set_limit(self._level)

    def forget(self) -> None:
        """Another range begins: the values so far say nothing of it."""
        self._newest.clear()
        self._distances.clear()
        self._since, self.limit, self._level = 0, math.inf, None

    def _set_limit(self, level: float) -> None:
        distances = np.array(self._distances)
        # (of the upper half alone: a loss that falls leaves its distances in the lower one)
        median, upper, tail = np.quantile(distances, (0.5, 0.75, TAIL))
        deviation = 1.4826 * float(upper - median)
        least = math.log(LEAST_FACTOR) if self._of_logs else max((LEAST_FACTOR - 1.0) * abs(level), 1e-12)
        limit = level + max(self.sigma * deviation, TAIL_FACTOR * float(tail), least)
        if self._of_logs:
            limit = math.exp(limit) if limit < 700.0 else math.inf
        self.limit = limit

    def state_dict(self) -> dict[str, Any]:
        """What the next limit depends on."""
        own = {"since": self._since, "level": self._level, "limit": self.limit}
        return {"newest": list(self._newest), "distances": list(self._distances), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; with a shorter window from its newest values."""
        self.forget()
        self._newest.extend(state["newest"])
        self._distances.extend(state["distances"])
        self._since, self._level, self.limit = state["since"], state["level"], state["limit"]


class UsualLoss:
    """The usual range of a loss: of its logarithm, so that a heavy tail is no spike, while every loss is positive.

    Args:
        sigma: How many standard deviations.
        window: How many of the newest values count.

    Example:
        >>> usual = UsualLoss()
        >>> for value in range(128):
        ...     usual.add(2.0 + 0.01 * (value % 3))
        >>> 2.02 < usual.limit < 3.0
        True
    """

    def __init__(self, sigma: float = 8.0, window: int = 128) -> None:
        self._ratios = UsualRange(sigma, window, of_logs=True)
        self._differences = UsualRange(sigma, window)
        self._is_positive = True

    @property
    def limit(self) -> float:
        """Above it a loss is a spike."""
        return self._range.limit

    @property
    def level(self) -> float:
        """What the losses usually are; NaN while too little is known."""
        return self._range.level

    def towards_limit(self, share: float) -> float:
        """What has gone so far from the level to the limit; infinite while there is none."""
        return self._range.towards_limit(share)

    @property
    def _range(self) -> UsualRange:
        return self._ratios if self._is_positive else self._differences

    def add(self, value: float) -> None:
        """Take in the loss of a step that was applied."""
        self._is_positive = self._is_positive and not value <= 0.0
        self._ratios.add(value)
        self._differences.add(value)

    def forget(self) -> None:
        """Another range begins."""
        self._is_positive = True
        self._ratios.forget()
        self._differences.forget()

    def state_dict(self) -> dict[str, Any]:
        """What the next limit depends on."""
        ranges = {"ratios": self._ratios.state_dict(), "differences": self._differences.state_dict()}
        return {**ranges, "is_positive": self._is_positive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self._ratios.load_state_dict(state["ratios"])
        self._differences.load_state_dict(state["differences"])
        self._is_positive = state["is_positive"]
