"""What became of the updates of a run."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from lightning_stability.health import StepRecord
from lightning_stability.runtime.record import Outcome


class Counts:
    """Counts updates by what became of them."""

    RECENT = 1000
    MANY = 0.05
    """Said once: when more than this share of the last `RECENT` updates was skipped."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.bad_in_a_row: Counter[int] = Counter()
        """By optimizer."""
        self._recent: deque[bool] = deque(maxlen=self.RECENT)
        self._said = False

    @property
    def updates(self) -> int:
        """Updates that were applied."""
        return self.outcomes[Outcome.APPLIED]

    @property
    def skipped(self) -> int:
        """Updates that were skipped, by GradScaler, by the guard, for their input, or for a spike."""
        skips = (Outcome.ORDINARY_SKIP, Outcome.BAD, Outcome.REJECTED, Outcome.SPIKE)
        return sum(self.outcomes[outcome] for outcome in skips)

    def add(self, record: StepRecord) -> int | None:
        """Count a step. Returns how many of the last updates were skipped when it is time to say that they are many."""
        outcome = record.outcome
        self.outcomes[outcome] += 1
        if outcome == Outcome.BAD:
            self.bad_in_a_row[record.optimizer] += 1
        elif outcome == Outcome.APPLIED:
            self.bad_in_a_row[record.optimizer] = 0
        if outcome in (Outcome.HELD, Outcome.NO_LOSS):
            return None
        self._recent.append(outcome in (Outcome.BAD, Outcome.REJECTED, Outcome.SPIKE))
        if self._said or len(self._recent) < self.RECENT:
            return None
        skipped = sum(self._recent)
        if skipped <= self.MANY * self.RECENT:
            return None
        self._said = True
        return skipped

    def state_dict(self) -> dict[str, int]:
        """A row of bad updates is not kept: who resumes after a stop begins a new one."""
        return {name: self.outcomes[outcome] for name, outcome in _NAMES.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting."""
        self.outcomes = Counter({outcome: state.get(name, 0) for name, outcome in _NAMES.items()})


_NAMES = {
    "updates": Outcome.APPLIED,
    "skipped_by_scaler": Outcome.ORDINARY_SKIP,
    "skipped_bad": Outcome.BAD,
    "rejected": Outcome.REJECTED,
    "held": Outcome.HELD,
    "skipped_spikes": Outcome.SPIKE,
}
