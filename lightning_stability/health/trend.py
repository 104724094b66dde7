"""Telling a gradient norm that rises out of its range from one that merely varies."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_stability.health.record import Floats

BLOCK_STEPS = 8
"""Every so many steps the usual norm is computed anew, and the groups' norms together."""
MEMORY_BLOCKS = 16
"""Blocks that are remembered; all but the newest `RECENT_BLOCKS` say what is usual."""
RECENT_BLOCKS = 3
"""Blocks too new to be usual: a rise cannot lift the range that it is leaving."""
RECENT_STEPS = BLOCK_STEPS * RECENT_BLOCKS

FAST_FACTOR, FAST_DEVIATIONS, FAST_STEPS = 5.0, 5.0, 3
"""A fast rise: so many steps in a row are above this multiple of the usual norm, and so many standard deviations up."""
SLOW_FACTOR, SLOW_DEVIATIONS = 10.0, 2.0
"""A slow rise: the same of more than half of the recent steps."""
ENOUGH_STEPS = 40
"""With fewer steps to say what is usual, the standard deviation does not widen the range of a slow rise: it may be the
rise itself, from step 0 on."""


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
    """Compares the newest norms with the usual one: the lower quartile of those before them.

    Everything is computed on the logarithm of the norm. Quartiles, not means: a spike does not move them, and neither
    does the rise itself until it has filled a quarter of the memory. The standard deviation is the distance between the
    quartiles divided by 1.35, as it is for a normal distribution.

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
        self._logs: deque[float] = deque(maxlen=BLOCK_STEPS * MEMORY_BLOCKS)
        self._group_logs: deque[Floats] = deque(maxlen=MEMORY_BLOCKS)  # one mean per block; NaN without a gradient
        self._block: list[Floats] = []  # what `update` was given since the last full block
        self._block_groups: list[Floats] = []  # the same, made into the groups' norms: by `state_dict` alone
        self._rising = False
        self._usual, self._fast_limit, self._slow_limit = 0.0, math.inf, math.inf

    def update(self, total: float, norms: Floats) -> Rise | None:
        """Take in one step's finite norms.

        Args:
            total: The total norm.
            norms: One norm per group, or whatever `norms_of_groups` makes them of. Nobody may write it later.

        Returns:
            What rose, at the step that makes it a rise; None on all others, until the norm is back in its range.
        """
        if total <= 0.0:
            return None
        value = math.log(total)
        self._logs.append(value)
        above = value > min(self._fast_limit, self._slow_limit)
        rise = self._judge(norms) if above or self._rising else None
        self._block.append(norms)
        if len(self._block) + len(self._block_groups) == BLOCK_STEPS:
            self._end_block()
        return rise

    def _judge(self, norms: Floats) -> Rise | None:
        recent = np.array(self._logs)[-RECENT_STEPS:]
        newest = recent[-FAST_STEPS:]
        if self._rising:
            # back in its range: halfway down to the usual norm, so that one rise is not called out again and again
            self._rising = bool((newest > (self._usual + min(self._fast_limit, self._slow_limit)) / 2).any())
            return None
        if not ((newest > self._fast_limit).all() or np.median(recent) > self._slow_limit):
            return None
        self._rising = True
        ratios = self._norms_of_groups(norms[None])[0] / np.exp(self._usual_of_groups())
        worst = int(np.argmax(np.where(np.isfinite(ratios), ratios, 0.0)))
        ratio = math.exp(recent[-1] - self._usual)
        return Rise(self.group_names[worst], float(f"{ratios[worst]:.6g}"), float(f"{ratio:.6g}"))

    def _end_block(self) -> None:
        self._group_block()
        groups, self._block_groups = np.stack(self._block_groups), []
        present = groups > 0.0  # a group without a gradient says nothing about its norm
        sums = np.log(np.where(present, groups, 1.0)).sum(axis=0)
        counts = present.sum(axis=0)
        self._group_logs.append(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))
        self._set_limits()

    def _group_block(self) -> None:
        if self._block:
            self._block_groups.extend(self._norms_of_groups(np.stack(self._block)))
            self._block = []

    def _set_limits(self) -> None:
        before = np.sort(np.array(self._logs)[:-RECENT_STEPS])
        if not len(before):
            return
        quarter = (len(before) - 1) // 4
        self._usual, upper = float(before[quarter]), float(before[-1 - quarter])
        deviation = (upper - self._usual) / 1.35
        self._fast_limit = self._usual + max(math.log(FAST_FACTOR), FAST_DEVIATIONS * deviation)
        if len(before) < ENOUGH_STEPS:
            deviation = 0.0
        self._slow_limit = self._usual + max(math.log(SLOW_FACTOR), SLOW_DEVIATIONS * deviation)

    def _usual_of_groups(self) -> Floats:
        """Each group's usual log norm: the lower quartile of its blocks; NaN for one that had no gradient."""
        blocks = np.sort(np.stack(self._group_logs)[:-RECENT_BLOCKS], axis=0)  # NaN last
        known = np.isfinite(blocks).sum(axis=0)
        usual: Floats = blocks[np.maximum(known - 1, 0) // 4, np.arange(len(self.group_names))]
        return usual

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next `update` depends on."""
        self._group_block()
        return {
            "group_names": list(self.group_names),
            "logs": list(self._logs),
            "group_logs": [block.tolist() for block in self._group_logs],
            "block": [norms.tolist() for norms in self._block_groups],
            "rising": self._rising,
            "limits": [self._usual, self._fast_limit, self._slow_limit],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, or start afresh if it is of other groups or of an older rule.

        Args:
            state: What `state_dict` returned.
        """
        if state.get("group_names") != list(self.group_names) or "logs" not in state:
            return
        self._logs.extend(state["logs"])
        self._group_logs.extend(np.array(block, dtype=np.float64) for block in state["group_logs"])
        self._block_groups = [np.array(norms, dtype=np.float64) for norms in state["block"]]
        self._rising = state["rising"]
        self._usual, self._fast_limit, self._slow_limit = state["limits"]
