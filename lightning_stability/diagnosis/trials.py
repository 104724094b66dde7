"""One counterfactual: the recorded step, run again with one thing changed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_stability.diagnosis.errors import DiagnosisError, OutOfTimeError
from lightning_stability.diagnosis.replay import Outcome, Replay
from lightning_stability.diagnosis.step import RecordedStep

Around = Callable[[Replay], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Change:
    """What is different in a trial.

    Attributes:
        name: What is changed: `"precision"`, `"samples"`, `"operation"`, ...
        words: How, in words that follow "with" or "in".
        step: Makes the changed step.
        around: Changes the copy that is run, for as long as it runs.
        compiled: Whether compiled code runs compiled; else it runs eagerly.
        instead: What is run instead of the step.
        facts: What a reader of the trial needs besides.
    """

    name: str
    words: str
    step: Callable[[RecordedStep], RecordedStep] = lambda step: step
    around: Around = lambda replay: contextlib.nullcontext()
    compiled: bool = False
    instead: Callable[[Replay], Outcome] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """What came of a change.

    Attributes:
        name: What was changed.
        change: How, in words.
        finite: Whether the step was finite; None if it could not be run.
        outcome: What came, in words.
        seconds: How long it took.
        facts: What the change was made of.
    """

    name: str
    change: str
    finite: bool | None
    outcome: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The trial as the report has it."""
        names = ("name", "change", "finite", "outcome")
        return {name: getattr(self, name) for name in names} | {"seconds": round(self.seconds, 4)}


class Laboratory:
    """Runs trials of one step within a budget.

    Args:
        failed: What became non-finite in its replay.
        budget_seconds: For all trials together.
        first_seconds: How long the replay before them took: a trial is expected to take as long, until one has run.
        progress: Told of each trial before it runs.
    """

    def __init__(
        self,
        step: RecordedStep,
        failed: str,
        budget_seconds: float,
        first_seconds: float = 0.0,
        progress: Callable[[str], object] = lambda message: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step = step
        self.trials: list[Trial] = []
        self._clock = clock
        self._end = clock() + budget_seconds
        self._first, self._longest = first_seconds, 0.0
        self._failed = failed
        self._bar = ""
        self._progress = progress

    def begin(self, number: int, of: int) -> None:
        """Say how many of the passes are done.

        Args:
            number: Of the one that begins, from 0.
        """
        self._bar = f"[{'#' * number}{'-' * (of - number)}]"

    def try_(self, change: Change, keep: bool = True) -> Trial:
        """Run the step with a change.

        Args:
            keep: Whether the trial is one of those that are shown; those of a search are not.

        Raises:
            OutOfTimeError: If it would not end within the budget.
        """
        start = self._clock()
        self._be_in_time()
        self._progress(f"{self._bar} {change.name}: {change.words}")
        finite, outcome = self._run(change)
        seconds = self._clock() - start
        trial = Trial(change.name, change.words, finite, outcome, seconds, change.facts)
        if keep:
            self.trials.append(trial)
        return trial

    def keep(self, trial: Trial) -> Trial:
        """Show a trial that a search has ended with."""
        self.trials.append(trial)
        return trial

    def _run(self, change: Change) -> tuple[bool | None, str]:
        try:
            step = change.step(self.step)
            came = self._replay(change, step)
            if self._is_scalers(came, step):
                came = self._replay(change, replace(step, loss_scale=1.0))
        except OutOfTimeError:
            raise
        except (DiagnosisError, LookupError, SyntaxError, ValueError) as error:
            return None, str(error).splitlines()[0]
        return came.failure is None, describe(came)

    def _replay(self, change: Change, step: RecordedStep) -> Outcome:
        self._be_in_time()
        start = self._clock()
        replay = Replay(step)
        with change.around(replay):
            came = change.instead(replay) if change.instead else replay.run(compiled=change.compiled)
        self._longest = max(self._longest, self._clock() - start)
        return came

    def _be_in_time(self) -> None:
        """Nothing interrupts a replay: one that would not end within the budget is not begun."""
        if self._clock() + (self._longest or self._first) > self._end:
            raise OutOfTimeError

    def _is_scalers(self, came: Outcome, step: RecordedStep) -> bool:
        """Whether only the gradients are too large, which GradScaler answers with a smaller scale."""
        is_gradient = came.failure is not None and came.failure.what == "gradient"
        return is_gradient and self._failed != "gradient" and (step.loss_scale or 1.0) > 1.0


def describe(outcome: Outcome) -> str:
    """What a replay came to, in words."""
    if outcome.failure is not None:
        return f"the {outcome.failure.what} is not finite"
    return f"finite, loss {outcome.losses[-1]:.4g}" if outcome.losses else "finite"
