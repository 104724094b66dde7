"""What a pass of the counterfactuals works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.signs import Signs
from lightning_stability.diagnosis.step import RecordedStep
from lightning_stability.diagnosis.trials import Laboratory

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
