"""What the runtime asks of a callback."""

from __future__ import annotations

from typing import Any, Protocol

from lightning_stability.health import StepRecord


class Policy(Protocol):
    """What a callback registers with the runtime: usually itself."""

    read_every: int
    """How many steps may pass before records are handed over. Several at a time cost less."""

    guards: bool
    """Whether bad updates shall be skipped."""

    patience: float
    """How many bad updates in a row the run may go on after; `math.inf` for any number."""

    reads_steps: bool
    """Whether it has to do with records at all; a run in which nobody has is not measured."""

    automatic: bool
    """Whether it came with the environment, and has to leave a run as it would be without."""

    asked_for: bool
    """Whether somebody named it. Where nobody did, a clean run gets no file."""

    def on_record(self, record: StepRecord) -> None:
        """Called once for each optimizer step, in order, some time after it."""

    def wants_update(self, logger_step: int) -> bool:
        """Whether the sizes of this step's update and weights shall be measured too."""

    def stand_aside(self, trainer: Any, reason: object) -> None:
        """Called on an automatic policy that this run cannot be served with: it detaches itself."""
