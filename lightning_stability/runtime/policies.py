"""What the session asks of a callback that registers with it."""

from __future__ import annotations

import enum
from typing import Any, Protocol

from lightning_stability.health import StepRecord


class Order(enum.IntEnum):
    """When a policy is shown a record, whatever its place in `Trainer(callbacks=[...])`.

    Example:
        >>> sorted([Order.OBSERVE, Order.STOP, Order.RETRY])
        [<Order.RETRY: 0>, <Order.STOP: 3>, <Order.OBSERVE: 4>]
    """

    RETRY = 0
    """May train the batches again; then all others see the record of the new try."""
    SKIP = 1
    REWIND = 2
    STOP = 3
    OBSERVE = 4


class Policy(Protocol):
    """What a callback registers with the session: usually itself."""

    session: Any
    """Set back to None when the session ends."""

    order: Order

    read_every: int
    """How many steps may pass before records are handed over. Several at a time cost less."""

    guards: bool
    """Whether bad updates shall be skipped."""

    patience: float
    """How many bad updates in a row to skip; the next one ends the run. `math.inf` for any number."""

    reads_steps: bool
    """Whether it needs records; a run in which nobody does is not measured."""

    reads_batches: bool
    """Whether it needs batches as they were before a 16-true precision cast them."""

    automatic: bool
    """Whether it came with the environment, and has to leave a run as it would be without."""

    asked_for: bool
    """Whether somebody named it. Where nobody did, a clean run gets no file."""

    def on_record(self, record: StepRecord) -> None:
        """Called once for each optimizer step, in order, some time after it."""

    def wants_update(self, logger_step: int) -> bool:
        """Whether the sizes of this step's update and weights shall be measured too."""

    def describe_skip(self, record: StepRecord) -> dict[str, Any]:
        """The fields of the event `update_skipped` that explain it."""

    def on_nonfinite_contents(self, restored: list[str], lost: list[str], all_ranks: bool) -> None:
        """Parameters or buffers became non-finite outside of a bad step; seen before a save or at an epoch's end."""

    def on_many_skips(self, skipped: int, of: int) -> None:
        """More than 5 % of the last updates were skipped; called once."""

    def skips_exception(self, exception: Exception, batch: Any) -> bool:
        """`training_step` has raised. Whether to count its batch as bad and to continue with the next one."""

    def on_session_end(self, exception: BaseException | None) -> None:
        """The fit ends, by this exception if it is one; the session is gone next."""

    def disable(self, trainer: Any, reason: object) -> None:
        """Called on an automatic policy that this run cannot be served with: it takes itself out."""


class DeliberateError:
    """Marks exceptions that are meant to end the run: they pass through where an error of ours would be contained."""
