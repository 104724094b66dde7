"""IncidentReport writes down a step that went wrong, so that it can be run again anywhere, and why it did."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_stability._compat import MisconfigurationException
from lightning_stability.callbacks.base import StabilityCallback, warn_always
from lightning_stability.diagnosis.errors import DiagnosisError
from lightning_stability.diagnosis.incident import write_incident
from lightning_stability.diagnosis.report import make_report, one_sentence, write_report
from lightning_stability.diagnosis.search import find_origin
from lightning_stability.diagnosis.step import RecordedStep
from lightning_stability.health import StepRecord
from lightning_stability.health.record import ParameterGroups
from lightning_stability.runtime import BadStep

_HISTORY = 500
_TRAINER = (
    *("current_epoch", "global_step", "max_epochs", "max_steps", "num_training_batches"),
    *("estimated_stepping_batches", "world_size", "global_rank", "local_rank"),
)
"""What a training_step may ask its Trainer for; numbers only."""


class IncidentReport(StabilityCallback):
    """Records every step that goes wrong, up to a number, and finds where its first non-finite value was made.

    Each becomes a folder `incidents/<n>-step<k>` with the batches, the state and the random state from before the
    step, the steps before it, and a report. `lightning-stability diagnose FOLDER` runs the step again on any machine.
    A full disk or a batch that cannot be saved does not end the run: what could not be kept is named.

    Args:
        dirpath: Where the folder `incidents` is made; the run's log folder by default.
        max_incidents: How many a run may write.
        save_state: Whether weights and optimizer states are kept. Without them the step can be run again only with
            the weights that the module is made with.
        budget_seconds: How long the search for the origin may take, in the run; 0 leaves it to the command.

    Raises:
        MisconfigurationException: If a number is out of its range.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[IncidentReport(max_incidents=1)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        max_incidents: int = 2,
        save_state: bool = True,
        budget_seconds: float = 60.0,
    ) -> None:
        if max_incidents < 1:
            raise MisconfigurationException(f"max_incidents is {max_incidents}; expected 1 or more")
        if not budget_seconds >= 0:
            raise MisconfigurationException(f"budget_seconds is {budget_seconds}; expected 0 or more")
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.max_incidents = max_incidents
        self.save_state = save_state
        self.budget_seconds = budget_seconds
        self._written = 0
        self._history: deque[StepRecord] = deque(maxlen=_HISTORY)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Be shown bad steps whole."""
        if stage == "fit" and self.session is not None:
            self.session.subscribe(self.on_bad_step)

    def on_record(self, record: StepRecord) -> None:
        """Keep what history.jsonl will say of the step."""
        self._history.append(record)

    def on_bad_step(self, bad: BadStep) -> None:
        """Write an incident. Whatever fails in it, the run continues."""
        try:
            self._write(bad)
        except Exception as error:
            step = bad.record.step
            warn_always(f"IncidentReport: the step at global step {step} was not recorded: {_reason(error)}", True)

    def _write(self, bad: BadStep) -> None:
        folder = self._folder()
        if self._written >= self.max_incidents or folder is None:
            return
        self._written += 1
        rank = f"-rank{bad.trainer.global_rank}" if bad.trainer.world_size > 1 else ""
        path = folder / f"{self._written}-step{bad.record.step}{rank}"
        step = to_recorded_step(bad)
        report = self._diagnose(step)
        history = [history_row(record) for record in self._history]
        left_out = write_incident(path, step, history, _details(bad.record), self.save_state)
        write_report(path, report)
        if self.session is not None:
            self.session.events.write(
                "incident_recorded", bad.record.step, bad.record.epoch, path=str(path), origin=report["origin"]
            )
        kept = "".join(f" {name} was not kept: {why}." for name, why in left_out.items())
        rank_zero_info(f"The step was recorded in {path}.{kept} Run it again: lightning-stability diagnose {path}")

    def state_dict(self) -> dict[str, Any]:
        """How many incidents the run has written."""
        return {"written": self._written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._written = state_dict["written"]

    def _folder(self) -> Path | None:
        if self.dirpath is not None:
            return self.dirpath / "incidents"
        events = None if self.session is None else self.session.events.path
        return None if events is None else events.parent / "incidents"

    def _diagnose(self, step: RecordedStep) -> dict[str, Any]:
        if not self.budget_seconds:
            return make_report(None, None, step.failed, ["it was not run again in the run"])
        try:
            origin = find_origin(step, self.budget_seconds)
        except Exception as error:  # the run has to go on, whatever this fails with
            return make_report(None, None, step.failed, [_reason(error)])
        return make_report(origin is not None, origin, step.failed)


def explain(bad: BadStep, budget_seconds: float = 10.0) -> str:
    """Where the first non-finite value of a step was made, in a sentence, for the message of a stop.

    Args:
        bad: The step, whole.
        budget_seconds: How long the search may take.
    """
    ranks = bad.record.bad_loss_ranks
    if ranks and bad.trainer.world_size > 1 and bad.trainer.global_rank not in ranks:
        return f"It came from rank {ranks[0]}."
    try:
        origin = find_origin(to_recorded_step(bad), budget_seconds)
    except Exception as error:  # the message is about the stop, whatever this fails with
        return f"Where it came from was not looked for: {_reason(error)}."
    if origin is None:
        return "Run again, the same step is finite: a transient fault, or something that is not recorded."
    sentence = one_sentence(origin)
    return f"{sentence[0].upper()}{sentence[1:]}."


def to_recorded_step(bad: BadStep) -> RecordedStep:
    """What the session hands over, as the diagnosis takes it.

    Args:
        bad: The step, whole.
    """
    trainer, record, window = bad.trainer, bad.record, bad.window
    if window is None or not window.batches:
        why = "manual optimization" if window is None else "its window of accumulated batches is too long"
        raise DiagnosisError(f"the step's batches are not kept: {why}")
    optimizers = list(trainer.optimizers)
    losses = [float(loss) for loss in record.batch_losses]
    return RecordedStep(
        module=trainer.lightning_module,
        batches=[batch.batch for batch in window.batches],
        random_states=[batch.random for batch in window.batches],
        batch_indices=[int(batch.kwargs.get("batch_idx", record.batch_idx)) for batch in window.batches],
        precision=str(trainer.precision_plugin.precision),
        losses=losses if len(losses) == len(window.batches) else [],
        failed=_failed(record),
        optimizers=optimizers,
        optimizer=next((i for i, o in enumerate(optimizers) if o is bad.optimizer), record.optimizer),
        loss_divisor=trainer.accumulate_grad_batches,
        loss_scale=record.loss_scale,
        clip_value=trainer.gradient_clip_val,
        clip_algorithm=str(getattr(trainer.gradient_clip_algorithm, "value", None) or "norm"),
        trainer={name: value for name in _TRAINER if isinstance(value := getattr(trainer, name, None), (int, float))},
        notes=["`training_step` changes its batch in place"] if window.changed_in_place() else [],
    )


def history_row(record: StepRecord) -> dict[str, Any]:
    """One step as history.jsonl has it; a number that is not finite is a word, because JSON has none.

    Args:
        record: The step's.
    """
    groups = ParameterGroups(record.parameter_names, group_depth=2)
    row = {
        "step": record.step,
        "epoch": record.epoch,
        "loss": record.loss,
        "grad_norm": record.total_norm,
        "grad_norms": dict(zip(groups.names, map(float, groups.norms(record.grad_norms)), strict=True)),
        "loss_scale": record.loss_scale,
        "learning_rates": list(record.learning_rates),
        "skipped_by": record.skipped_by,
        "outcome": record.outcome,
    }
    return {name: _as_json(value) for name, value in row.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DiagnosisError) else f"{type(error).__name__}: {error}"


def _failed(record: StepRecord) -> str:
    if not record.loss_finite or record.bad_loss_ranks:
        return "loss"
    if record.nonfinite_buffer is not None:
        return "buffer"
    return "gradient" if not record.gradients_finite else "weight"


def _details(record: StepRecord) -> dict[str, Any]:
    names = ("step", "logger_step", "epoch", "batch_idx", "batch_number", "outcome", "skipped_by", "nonfinite_buffer")
    return {name: getattr(record, name) for name in names} | {"ranks": list(record.bad_loss_ranks)}


__all__ = ["IncidentReport", "explain", "history_row", "to_recorded_step"]
