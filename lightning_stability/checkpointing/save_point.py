"""A point in a fit where a save is right, and who is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol


@dataclass(frozen=True)
class SavePoint:
    """Where a run is when a batch or an epoch is over."""

    epoch: int
    """Epochs that are over."""
    batches: int
    """Batches that are over in the epoch under way; 0 between two epochs."""
    stepped: bool
    """Whether the optimizer has stepped in the last batch."""
    ending: bool
    """Whether the fit ends here."""
    over: bool = True
    """Whether the batch is over. If only its hooks are, a resumed run begins with what is left of it."""

    def epochs(self, batches_per_epoch: float) -> Fraction:
        """Epochs trained, as a fraction."""
        return self.epoch + Fraction(min(self.batches, int(batches_per_epoch)), int(batches_per_epoch))


class Listener(Protocol):
    """Is told of the points where a save is right."""

    def on_place(self, trainer: Any, place: SavePoint) -> None:
        """Called when a batch, or the last one's epoch, is over."""

    def on_resumed(self, trainer: Any) -> None:
        """Called when a resumed run is where it was."""

    def on_failure(self, trainer: Any, error: Exception) -> bool:
        """The save points have failed. Whether the run can continue without them."""
