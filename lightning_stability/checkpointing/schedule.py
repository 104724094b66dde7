"""When to save: every so many epochs, counted continuously, in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction


class EpochSchedule:
    """The k-th save is due at the first optimizer step at or after `k * every_n_epochs`.

    Fractions, not floats: nothing drifts, whatever the number of epochs. 0.1 is a tenth and 1/3 is a third.

    Args:
        every_n_epochs: The interval, above 0.

    Example:
        >>> schedule = EpochSchedule(0.3)
        >>> [step for step in range(1, 15) if schedule.is_due(Fraction(step, 7))]
        [3, 5, 7, 9, 11, 13]
    """

    def __init__(self, every_n_epochs: float) -> None:
        self.interval = Fraction(every_n_epochs).limit_denominator(10**6) or Fraction(every_n_epochs)
        self._passed = 0

    def is_due(self, epochs: Fraction) -> bool:
        """Whether a save is due now that so many epochs are trained; tells so once for each.

        Args:
            epochs: Epochs trained so far, at an optimizer step.
        """
        passed = epochs // self.interval
        due = passed > self._passed
        self._passed = max(passed, self._passed)
        return due

    def start_at(self, epochs: Fraction) -> None:
        """Begin where a resumed run is: what was due up to there is done."""
        self._passed = epochs // self.interval

    def go_back_to(self, epochs: Fraction) -> None:
        """What was due after that is due again, if an epoch begins again that was under way."""
        self._passed = min(self._passed, epochs // self.interval)

    @property
    def digits(self) -> int:
        """Decimal places that tell any two saves apart: those of the interval, if it has few."""
        for digits in (2, 3, 4):
            if (self.interval * 10**digits).denominator == 1:
                return digits
        return max(2, math.ceil(-math.log10(self.interval)))


class EpochCount(float):
    """A number of epochs for file names: "000.25" unless a format asks for something else."""

    width = 6
    digits = 2

    @classmethod
    def of(cls, epochs: Fraction, digits: int, max_epochs: int | None) -> EpochCount:
        """Cut off, not rounded: "001.00" is a whole epoch.

        Args:
            max_epochs: The largest there may be, so that names of the same length sort by time.
        """
        count = cls(math.floor(epochs * 10**digits) / 10**digits)
        count.digits = digits
        count.width = max(3, len(str(max_epochs or 0))) + 1 + digits
        return count

    def __format__(self, spec: str) -> str:
        if spec.endswith("d"):
            return format(int(self), spec)
        return format(float(self), spec or f"0{self.width}.{self.digits}f")
