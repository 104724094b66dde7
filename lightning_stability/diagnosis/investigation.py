"""From a recorded step to its causes: look at it, read the signs, try, conclude."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_stability.diagnosis.causes import Case, Cause, find_causes
from lightning_stability.diagnosis.counterfactuals import Bench, run_trials
from lightning_stability.diagnosis.origin import Origin
from lightning_stability.diagnosis.replay import Outcome
from lightning_stability.diagnosis.search import look_at
from lightning_stability.diagnosis.signs import Signs, read_signs
from lightning_stability.diagnosis.step import RecordedStep
from lightning_stability.diagnosis.trials import Laboratory, Trial

Weights = list[tuple[int, Callable[[], dict[str, Tensor]]]]


@dataclass
class Findings:
    """What an investigation found.

    Attributes:
        origin: Where the first non-finite value was made; None if the step is finite now.
        outcome: Of the replay.
        signs: What its numbers say.
        trials: What was tried.
        causes: Likeliest first.
        was_complete: Whether there was time for all trials that were worth it.
    """

    origin: Origin | None
    outcome: Outcome
    signs: Signs
    trials: list[Trial] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    was_complete: bool = True


def investigate(
    step: RecordedStep,
    history: list[dict[str, Any]] | None = None,
    budget_seconds: float = math.inf,
    *,
    dataset_indices: list[list[int] | None] | None = None,
    earlier: Weights | None = None,
    is_elsewhere: bool = False,
    progress: Callable[[str], object] = lambda message: None,
) -> Findings:
    """Find the causes of a recorded step's failure by experiment.

    The module, its gradients, metrics and optimizers and the process's random state are left as they are.

    Args:
        step: The recorded step.
        history: Rows of the steps before, as history.jsonl has them.
        budget_seconds: For everything; trials that would not end within it are left out.
        dataset_indices: Of the samples of each batch of the window, where known.
        earlier: Weights of checkpoints from before the step, the newest first.
        is_elsewhere: Whether the step was recorded on another machine or with other versions.
        progress: Told what is tried next.

    Raises:
        DiagnosisError: If the step cannot be run again, or its origin not be found in time.
    """
    end = time.monotonic() + budget_seconds
    origin, outcome, trace = look_at(step, budget_seconds)
    signs = read_signs(step, origin, outcome, trace, history or [], dataset_indices)
    del trace
    laboratory = Laboratory(step, end - time.monotonic(), progress)
    complete = run_trials(Bench(laboratory, step, origin, signs, earlier or []))
    case = Case(origin, signs, laboratory.trials, is_elsewhere)
    return Findings(origin, outcome, signs, laboratory.trials, find_causes(case), complete)
