"""Telling a gradient norm that rises out of its range from one that is merely noisy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_stability.health.record import Floats

MEMORY_STEPS = 50
"""Steps over which the mean and the deviation forget; also the steps before the first warning."""
DEVIATIONS = 4.0
"""How many deviations above the mean of the log norm are out of range."""
LEAST_FACTOR = 3.0
"""A norm below this multiple of its usual value is never called out, however steady it was before."""
LARGEST_STEP = 2.0
"""A value further off than this many deviations counts as one at that distance: a slow rise cannot widen the
range in front of it."""
SMALLEST_DEVIATION = 0.05
"""A deviation below this (5% of the norm) counts as this: else a steady norm could never move on."""
STEPS_IN_A_ROW = 3
"""A single spike is ordinary; this many steps out of range are a rise."""
STEPS_AT_ONCE = 8
"""The groups' norms of so many steps are worked out together: one by one that costs more than all the rest."""


@dataclass(frozen=True, slots=True)
class Rise:
    """A norm that left its range.

    Attributes:
        group: The group that grew most over its own usual norm.
        group_ratio: That group's norm over its usual one.
        ratio: The total norm over its usual one.
    """

    group: str
    group_ratio: float
    ratio: float


class NormTrend:
    """Follows the logarithm of a norm with an exponentially weighted mean and deviation.

    With weight `w = max(1 / n, 1 / 50)` for the n-th value `x` and `d = x - mean`: `mean += w d` and
    `variance = (1 - w) (variance + w d^2)` (T. Finch, "Incremental calculation of weighted mean and
    variance", 2009).

    Once there is a usual value, `d` is held within two deviations: a rise then hardly moves the range that it
    is leaving, while a lasting new level is accepted in time.

    Args:
        group_names: The groups whose norms come with each total.
        norms_of_groups: Makes them, one row per step, of what `update` is given, one row per step; left out where
            `update` is given the groups' norms.

    Example:
        >>> import numpy as np
        >>> trend = NormTrend(("encoder", "head"))
        >>> for _ in range(60):
        ...     assert trend.update(1.0, np.array([0.6, 0.8])) is None
        >>> rises = [trend.update(10.0, np.array([9.9, 0.8])) for _ in range(3)]
        >>> rises[0], rises[1], rises[2].group, rises[2].group_ratio
        (None, None, 'encoder', 16.5)
    """

    def __init__(
        self, group_names: tuple[str, ...], norms_of_groups: Callable[[Floats], Floats] = lambda norms: norms
    ) -> None:
        self.group_names = group_names
        self._norms_of_groups = norms_of_groups
        self._waiting: list[tuple[Floats, float]] = []  # a step's norms, its weight
        self._count = 0
        self._mean = 0.0
        self._variance = 0.0
        self._group_means = np.full(len(group_names), np.nan)
        self._all_known = False
        self._steps_above = 0
        self._rising = False

    def update(self, total: float, norms: Floats) -> Rise | None:
        """Take in one step's finite norms.

        Args:
            total: The total norm.
            norms: One norm per group, or whatever `norms_of_groups` makes them of. Nobody may write it later.

        Returns:
            What rose, at the step that makes it a rise; None on all others, until the norm has come back.
        """
        if total <= 0.0:
            return None
        value = math.log(total)
        margin = max(DEVIATIONS * math.sqrt(self._variance), math.log(LEAST_FACTOR))
        rise = self._judge(value, margin, norms) if self._count >= MEMORY_STEPS else None
        self._count += 1
        weight = max(1.0 / self._count, 1.0 / MEMORY_STEPS)
        difference = value - self._mean
        if self._count > MEMORY_STEPS:
            edge = LARGEST_STEP * max(math.sqrt(self._variance), SMALLEST_DEVIATION)
            difference = min(max(difference, -edge), edge)
        self._mean += weight * difference
        self._variance = (1.0 - weight) * (self._variance + weight * difference * difference)
        if not self._steps_above:  # a group's usual norm is the one from before the rise
            self._waiting.append((norms, weight))
            if len(self._waiting) >= STEPS_AT_ONCE:
                self._follow_groups()
        return rise

    def _judge(self, value: float, margin: float, norms: Floats) -> Rise | None:
        if value <= self._mean + margin:
            self._steps_above = 0
            self._rising = self._rising and value > self._mean + margin / 2
            return None
        self._steps_above += 1
        if self._rising or self._steps_above < STEPS_IN_A_ROW:
            return None
        self._rising = True
        self._follow_groups()
        ratios = self._norms_of_groups(norms[None])[0] / np.exp(self._group_means)
        worst = int(np.argmax(np.where(np.isfinite(ratios), ratios, 0.0)))
        return Rise(
            self.group_names[worst],
            float(f"{ratios[worst]:.6g}"),
            float(f"{math.exp(value - self._mean):.6g}"),
        )

    def _follow_groups(self) -> None:
        """Take in the groups' norms of the steps that wait."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        rows = self._norms_of_groups(np.stack([norms for norms, _ in waiting]))
        if not self._all_known or not rows.all():
            for row, (_, weight) in zip(rows, waiting, strict=True):
                self._follow_some(row, weight)
            return
        # mean += w (log - mean) for one step after the other, in one product
        shares, rest = [], 1.0
        for _, weight in reversed(waiting):
            shares.append(rest * weight)
            rest *= 1.0 - weight
        self._group_means = rest * self._group_means + np.array(shares[::-1]) @ np.log(rows)

    def _follow_some(self, group_norms: Floats, weight: float) -> None:
        known = group_norms > 0.0  # a group without a gradient says nothing about its norm
        logs = np.log(np.where(known, group_norms, 1.0))
        start = np.where(np.isnan(self._group_means), logs, self._group_means)
        self._group_means = np.where(known, start + weight * (logs - start), self._group_means)
        self._all_known = not np.isnan(self._group_means).any()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next `update` depends on."""
        self._follow_groups()
        return {
            "group_names": list(self.group_names),
            "count": self._count,
            "mean": self._mean,
            "variance": self._variance,
            "group_means": self._group_means.tolist(),
            "steps_above": self._steps_above,
            "rising": self._rising,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, or start afresh if it is of other groups.

        Args:
            state: What `state_dict` returned.
        """
        if tuple(state["group_names"]) != self.group_names:
            return
        self._count, self._mean, self._variance = state["count"], state["mean"], state["variance"]
        self._group_means = np.array(state["group_means"], dtype=np.float64)
        self._all_known = not np.isnan(self._group_means).any()
        self._waiting = []
        self._steps_above, self._rising = state["steps_above"], state["rising"]
