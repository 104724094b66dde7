"""What a pass of the counterfactuals works with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from lightning_stability.diagnosis.ddmin import ddmin
from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.signs import Signs
from lightning_stability.diagnosis.step import RecordedStep
from lightning_stability.diagnosis.trials import Change, Laboratory, Trial

T = TypeVar("T")

MOST_ITEMS = 512
"""Samples, columns and modules that a search looks through."""


@dataclass
class Bench:
    """What a pass works with.

    Attributes:
        lab: Runs trials.
        step: The recorded step.
        origin: Where its first non-finite value was made; None if it is finite now.
        signs: What its numbers say.
        earlier: Weights of checkpoints from before the step, the newest first: their step, and a function that loads.
    """

    lab: Laboratory
    step: RecordedStep
    origin: Origin | None
    signs: Signs
    earlier: list[tuple[int, Callable[[], dict[str, Tensor]]]]

    def keep_smallest(self, items: Sequence[T], make: Callable[[list[T]], Change], whole: Trial) -> list[T]:
        """Search for the smallest part of a set whose change is still a cure, and show the trial that had it.

        Args:
            make: The change of a part.
            whole: The trial of all of it, which was a cure.

        Raises:
            OutOfTimeError: If the search does not end in time; the smallest part so far is shown.
        """
        best = whole

        def is_enough(part: list[T]) -> bool:
            nonlocal best
            trial = self.lab.try_(make(part), keep=False) if part else None
            if trial is not None and trial.finite:
                best = trial
                return True
            return False

        try:
            return ddmin(items, is_enough)
        finally:
            self.lab.keep(best)
