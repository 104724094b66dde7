"""What became of each step is counted, written to events.jsonl, and shown to the policies in their order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from lightning_stability._compat import MisconfigurationException
from lightning_stability.events import EventLog
from lightning_stability.health import StepRecord
from lightning_stability.runtime.containment import contain_hooks
from lightning_stability.runtime.counts import Counts
from lightning_stability.runtime.policies import DeliberateError, Order, Policy
from lightning_stability.runtime.record import Outcome
from lightning_stability.runtime.trainers import refuse_optimizer

_SKIPS = (Outcome.ORDINARY_SKIP, Outcome.BAD, Outcome.REJECTED, Outcome.SPIKE)
_PROGRESS_SECONDS = 5.0


class Dispatch:
    """The policies of one session."""

    def __init__(self, trainer: Callable[[], Any], events: EventLog) -> None:
        self._trainer = trainer
        self._events = events
        self._progress_at = -math.inf
        self._started_at = time.monotonic()
        self._last: StepRecord | None = None
        self.policies: list[Policy] = []
        self.counts = Counts()
        self.rejected_by = ""
        """Who has rejected batches, for the event."""

    # The policies.

    def add(self, policy: Policy) -> None:
        """Show it every step from now on."""
        self.policies.append(policy)
        self.policies.sort(key=lambda policy: policy.order)
        if policy.automatic:
            contain_hooks(policy, lambda error: self.on_error(error, policy))

    def those_that_guard(self) -> list[Policy]:
        """The policies for which bad updates are skipped."""
        return [policy for policy in self.policies if policy.guards]

    @property
    def read_steps(self) -> bool:
        """Whether any needs records."""
        for policy in self.policies:  # noqa: SIM110 (asked several times a step, and this makes no generator)
            if policy.reads_steps:
                return True
        return False

    @property
    def need_hooks(self) -> bool:
        """Whether any needs records, or batches before their cast."""
        return any(policy.reads_steps or policy.reads_batches for policy in self.policies)

    @property
    def read_every(self) -> int:
        """How many steps may pass before records are handed over."""
        return min((policy.read_every for policy in self.policies if policy.reads_steps), default=1)

    @property
    def patience(self) -> float:
        """After how many bad updates in a row the run ends."""
        return min((policy.patience for policy in self.policies), default=math.inf)

    @property
    def rewinds(self) -> bool:
        """Whether one restores an earlier state when patience is used up."""
        return any(policy.order == Order.REWIND and policy.patience < math.inf for policy in self.policies)

    @property
    def asked_for(self) -> bool:
        """Whether somebody named one of them."""
        return any(policy.asked_for for policy in self.policies)

    def is_automatic(self) -> bool:
        """Whether all of them came with the environment."""
        return all(policy.automatic for policy in self.policies)

    def wants_update(self, logger_step: int) -> bool:
        """Whether any wants the sizes of this step's update and weights."""
        return any(policy.wants_update(logger_step) for policy in self.policies)

    # Steps.

    def deliver(self, record: StepRecord) -> None:
        """Count a step, write its event, and show it to the policies."""
        self._last = record
        many = self.counts.add(record)
        if self._trainer().is_global_zero:
            if record.outcome in _SKIPS and (self.asked_for or record.outcome != Outcome.ORDINARY_SKIP):
                # (every run in 16-mixed begins with ordinary skips: where nobody asked, no reason for a file)
                self._write_skip(record)
            if many:
                self._events.write("many_skips", record.step, record.epoch, skipped=many, of=self.counts.RECENT)
        for policy in list(self.policies):
            if policy in self.policies:  # an earlier one may have taken it out
                self.contain(policy.on_record, record, policy=policy)
        guarding = self.those_that_guard()
        if many and guarding:
            self.contain(guarding[0].on_many_skips, many, self.counts.RECENT, policy=guarding[0])

    def skips_exception(self, error: Exception, batch: Any) -> bool:
        """Tell all of an exception in a training step; whether any wants its batch left out."""
        wishes = [self.contain(policy.skips_exception, error, batch, policy=policy) for policy in list(self.policies)]
        return any(wishes)

    def nonfinite_contents(self, restored: list[str], lost: list[str], all_ranks: bool) -> None:
        """Parameters or buffers became non-finite outside of a bad step."""
        trainer = self._trainer()
        if trainer.is_global_zero:
            step, epoch = trainer.global_step, trainer.current_epoch
            self._events.write("contents_nonfinite", step, epoch, restored=restored, not_restored=lost)
        for policy in self.those_that_guard():
            self.contain(policy.on_nonfinite_contents, restored, lost, all_ranks, policy=policy)

    def start(self) -> None:
        """Training starts."""
        self._started_at = time.monotonic()

    def write_progress(self, batch_idx: int, always: bool = False) -> None:
        """Write how far the run is, at most once in a few seconds."""
        now, trainer, record = time.monotonic(), self._trainer(), self._last
        if not always and now - self._progress_at < _PROGRESS_SECONDS:
            return
        if not trainer.is_global_zero or self._events.path is None or not self.asked_for:
            return
        self._progress_at, batches = now, trainer.num_training_batches
        self._events.write(
            "progress",
            trainer.global_step,
            trainer.current_epoch,
            batch_idx=batch_idx,
            batches=int(batches) if math.isfinite(batches) else None,
            loss=None if record is None else record.loss,
            grad_norm=None if record is None else record.total_norm,
            loss_scale=None if record is None else record.loss_scale,
            learning_rate=None if record is None or not record.learning_rates else record.learning_rates[0],
            skipped=self.counts.skipped,
            seconds=round(now - self._started_at, 3),
        )

    def _write_skip(self, record: StepRecord) -> None:
        details: dict[str, Any] = {}
        for policy in list(self.policies):
            details = details or self.contain(policy.describe_skip, record, policy=policy) or {}
        self._events.write(
            "update_skipped",
            record.step,
            record.epoch,
            by=self.rejected_by if record.outcome == Outcome.REJECTED else record.skipped_by,
            ordinary=record.outcome == Outcome.ORDINARY_SKIP,
            **details,
            batch_idx=record.batch_idx,
            batches=record.batches,
            loss=record.loss,
            loss_scale=record.loss_scale,
        )

    # Errors.

    def may_guard(self, optimizers: list[Any]) -> bool:
        """Whether a policy wants updates guarded. If they cannot be, automatic policies leave; others refuse."""
        guarding = self.those_that_guard()
        try:
            for optimizer in optimizers if guarding else ():
                refuse_optimizer(optimizer)
        except MisconfigurationException as refusal:
            self.refuse_to_guard(refusal)
            return False
        return bool(guarding)

    def refuse_to_guard(self, refusal: MisconfigurationException) -> None:
        """Updates cannot be guarded: raise it; if only automatic policies wanted that, they disable themselves."""
        guarding = self.those_that_guard()
        if not all(policy.automatic for policy in guarding):
            raise refusal
        for policy in guarding:
            policy.disable(self._trainer(), refusal)

    def contain(self, action: Callable[..., Any], *args: Any, policy: Policy | None = None) -> Any:
        """Call ours; an error of a policy that came with the environment, or of all, disables it and ends nothing."""
        try:
            return action(*args)
        except Exception as error:
            if isinstance(error, (DeliberateError, StopIteration)) or not self.on_error(error, policy):
                raise
            return None

    def on_error(self, error: Exception, policy: Policy | None = None) -> bool:
        """Have the failing policies disable themselves. Returns whether the run can continue."""
        failing = list(self.policies) if policy is None else [policy]
        if not failing or not all(policy.automatic for policy in failing):
            return False
        reason = error if isinstance(error, MisconfigurationException) else repr(error)
        for policy in failing:
            if policy in self.policies:  # else it has failed within what it calls, and is disabled already
                policy.disable(self._trainer(), reason)
        return True
