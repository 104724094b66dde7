"""From a recorded step to its causes: look at it, read the signs, try, conclude."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lightning_stability.diagnosis.bench import Bench
from lightning_stability.diagnosis.causes import Case, Cause, find_causes
from lightning_stability.diagnosis.counterfactuals import run_trials
from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.remedies import remedy_for
from lightning_stability.diagnosis.replay import Outcome
from lightning_stability.diagnosis.search import look_at
from lightning_stability.diagnosis.signs import Signs, read_signs
from lightning_stability.diagnosis.step import RecordedStep
from lightning_stability.diagnosis.trials import Laboratory, Trial
from lightning_stability.diagnosis.wording import evidence_for, excluded_by, summary_of

Weights = list[tuple[int, Callable[[], dict[str, Tensor]]]]


@dataclass
class Findings:
    """What an investigation found.

    Attributes:
        origin: Where the first non-finite value was made; None if the step is finite now.
        outcome: Of the replay.
        signs: What its numbers say.
        trials: What was tried.
        causes: Likeliest first; one at least.
        excluded: What was tried and is no cause.
        not_tried: What there was no time for, in words.
    """

    origin: Origin | None
    outcome: Outcome
    signs: Signs
    trials: list[Trial] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    excluded: list[dict[str, Any]] = field(default_factory=list)
    not_tried: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What a reader of the causes has to know besides."""
        if not self.not_tried:
            return []
        return [f"there was no time to try {', '.join(self.not_tried)}; `diagnose --budget` gives more"]

    def as_json(self) -> dict[str, Any]:
        """What the report says of causes and trials."""
        return {
            "causes": [cause.as_json() for cause in self.causes],
            "counterfactuals": [trial.as_json() for trial in self.trials],
            "excluded": self.excluded,
            "not_tried": self.not_tried,
        }


def investigate(
    step: RecordedStep,
    history: list[dict[str, Any]] | None = None,
    budget_seconds: float = math.inf,
    *,
    dataset_indices: list[list[int] | None] | None = None,
    descriptions: list[list[str]] | None = None,
    earlier: Weights | None = None,
    may_differ: bool = False,
    progress: Callable[[str], object] = lambda message: None,
    clock: Callable[[], float] = time.monotonic,
) -> Findings:
    """Find the causes of a recorded step's failure by experiment.

    The module, its gradients, metrics and optimizers and the process's random state are left as they are.

    Args:
        history: Rows of the steps before, as history.jsonl has them.
        budget_seconds: For everything; trials that would not end within it are left out.
        dataset_indices: Of the samples of each batch of the window, where known.
        descriptions: Of the same samples, where known.
        earlier: Weights of checkpoints from before the step, the newest first.
        may_differ: Whether a replay may be another step than the recorded one, as on another machine.
        progress: Told what is tried next.

    Raises:
        DiagnosisError: If the step cannot be run again, or its origin not be found in time.
    """
    start = clock()
    origin, outcome, trace = look_at(step, budget_seconds, clock)
    first = clock() - start
    signs = read_signs(step, origin, outcome, trace, history or [], dataset_indices, descriptions)
    del trace
    left = start + budget_seconds - clock()
    laboratory = Laboratory(step, signs.failed, left, first, progress, clock)
    not_tried = run_trials(Bench(laboratory, step, origin, signs, earlier or []))
    case = Case(origin, signs, laboratory.trials, may_differ)
    causes = [
        replace(
            cause, summary=summary_of(cause, case), evidence=evidence_for(cause, case), remedy=remedy_for(cause, case)
        )
        for cause in find_causes(case)
    ]
    return Findings(origin, outcome, signs, laboratory.trials, causes, excluded_by(case, causes[0]), not_tried)
