"""An incident is written into its folder, and diagnosed in memory; loaded once a step goes wrong."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_stability.callbacks.base import warn_always
from lightning_stability.callbacks.loggers import notify_loggers
from lightning_stability.callbacks.validation_watch import ValidationBatch
from lightning_stability.diagnosis.entries import batch_size
from lightning_stability.diagnosis.errors import DiagnosisError
from lightning_stability.diagnosis.html import write_page
from lightning_stability.diagnosis.incident import write_incident
from lightning_stability.diagnosis.investigation import investigate
from lightning_stability.diagnosis.layers import measure_layers
from lightning_stability.diagnosis.plain import NotPlainError, to_plain
from lightning_stability.diagnosis.report import cause_in_a_line, make_report, one_sentence, write_report
from lightning_stability.diagnosis.step import REJECTED, RecordedStep, capture_state
from lightning_stability.events import EventLog
from lightning_stability.health import StepRecord
from lightning_stability.health.record import ParameterGroups
from lightning_stability.internals import logger_step, trained_before_toggle
from lightning_stability.runtime import BadStep, ManualWindow, Outcome

_TRAINER = (
    *("current_epoch", "global_step", "max_epochs", "max_steps", "num_training_batches"),
    *("estimated_stepping_batches", "world_size", "global_rank", "local_rank"),
)
"""What a training_step may ask its Trainer for; numbers only."""


@dataclass
class IncidentWriter:
    """Writes one incident.

    Attributes:
        folder: The run's folder of incidents.
        number: Which of the run's it is, on all ranks alike.
        save_state: Whether weights and optimizer states are kept.
        budget_seconds: How long the search for the origin may take.
        events: Where it is told.
    """

    folder: Path
    number: int
    save_state: bool
    budget_seconds: float
    events: EventLog

    def write(self, bad: BadStep, records: list[StepRecord], dataset_indices: list[list[int] | None]) -> None:
        """Write the incident. Whatever fails in it, the run continues.

        Args:
            bad: The step, whole, with the state from before it.
            dataset_indices: Of the samples of each batch; None where they are not known.
        """
        with _said(f"the step at {_place(bad.record)}"):
            self._write(bad, records, dataset_indices)

    def write_validation(self, trainer: Any, bad: ValidationBatch, records: list[StepRecord]) -> None:
        """The same of a batch of the validation."""
        loader = f" of loader {bad.loader}" if bad.loader else ""
        epoch, global_step = trainer.current_epoch, trainer.global_step
        what = f"validation batch {bad.batch_idx}{loader} at epoch {epoch}, global step {global_step}"
        with _said(what), torch.inference_mode(False):
            step = _validation_step(trainer, bad)
            details = {"step": global_step, "epoch": epoch, "batch_idx": bad.batch_idx}
            path, left_out = self._save(trainer, global_step, step, records, details)
            diagnosed = self._diagnose(step, {"history": [history_row(record) for record in records]})
            self._tell(trainer, what, path, left_out, step, diagnosed, details)

    def _write(self, bad: BadStep, records: list[StepRecord], dataset_indices: list[list[int] | None]) -> None:
        trainer, record = bad.trainer, bad.record
        several = trainer.world_size > 1
        if several and record.bad_loss_ranks and trainer.global_rank not in record.bad_loss_ranks:
            return
        step = to_recorded_step(bad)
        diagnosed: tuple[dict[str, Any], str | None] | None = None
        samples = {"dataset_indices": dataset_indices, "descriptions": _descriptions(trainer, step)}
        about = {"history": [history_row(r) for r in records], **samples}
        if several and not record.bad_loss_ranks and step.failed != REJECTED:
            # All ranks have the same non-finite gradients. The rank that they come from finds that in its own replay.
            diagnosed = self._diagnose(step, about)
            if diagnosed[0]["reproduced"] is False:
                return
        details = _details(record) | samples
        path, left_out = self._save(trainer, record.step, step, records, details)
        self._tell(
            trainer,
            f"the step at {_place(record)}",
            path,
            left_out,
            step,
            diagnosed or self._diagnose(step, about),
            details,
        )

    def _tell(
        self,
        trainer: Any,
        what: str,
        path: Path,
        left_out: dict[str, str],
        step: RecordedStep,
        diagnosed: tuple[dict[str, Any], str | None],
        details: dict[str, Any],
    ) -> None:
        report, sentence = diagnosed
        if self.budget_seconds:
            report["layers"] = measure_layers(step)
        write_report(path, report)
        write_page(path, report)
        cause = cause_in_a_line(report)
        self.events.write(
            "incident_recorded",
            details["step"],
            details["epoch"],
            batch_idx=details["batch_idx"],
            what=step.failed,
            path=str(path),
            reproduced=report["reproduced"],
            origin=sentence,
            cause=cause,
            left_out=left_out,
        )
        title = f"Incident at step {details['step']}"
        text = f"{cause or sentence or 'its cause was not found'}. The report is in {path}."
        notify_loggers(trainer, title, text, "lightning_stability/incident", logger_step(trainer))
        kept = "".join(f" {name} was not kept: {why}." for name, why in left_out.items())
        found = f" {sentence[0].upper()}{sentence[1:]}." if sentence else ""
        found += f" Cause: {cause}." if cause else ""
        warn_always(
            f"IncidentReport: {what} was recorded in {path}.{found}{kept} Run it again:"
            f" lightning-stability diagnose {path}",
            on_this_rank=True,
        )

    def _save(
        self, trainer: Any, number_of_step: int, step: RecordedStep, records: list[StepRecord], details: dict[str, Any]
    ) -> tuple[Path, dict[str, str]]:
        """Write it under the next free number; nothing that is there is replaced."""
        name = f"step{number_of_step}"
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        history = [history_row(record) for record in records]
        self.folder.mkdir(parents=True, exist_ok=True)  # a file of that name would take every number
        for number in itertools.count(self.number):
            path = self.folder / f"{number}-{name}{rank}"
            others = [
                p for p in self.folder.glob(f"{number}-*") if not (rank and p.name.startswith(f"{number}-{name}-rank"))
            ]
            if others or path.exists():
                continue
            try:
                return path, write_incident(path, step, history, details, self.save_state)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        raise AssertionError("numbers do not end")

    def _diagnose(self, step: RecordedStep, about: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """The report, and the origin in a sentence."""
        if not self.budget_seconds:
            return make_report(None, None, step.failed, ["it was not run again in the run"]), None
        try:
            found = investigate(step, budget_seconds=self.budget_seconds, may_differ=bool(step.notes), **about)
        except Exception as error:  # the run has to continue, whatever this fails with
            return make_report(None, None, step.failed, [_reason(error), *step.notes]), None
        notes = [*step.notes, *found.notes]
        report = make_report(found.origin is not None, found.origin, step.failed, notes, **found.as_json())
        return report, None if found.origin is None else one_sentence(found.origin)


def _descriptions(trainer: Any, step: RecordedStep) -> list[list[str]] | None:
    """What `describe_sample` of the data module or the module says of each sample; None without one that works."""
    owners = (getattr(trainer, "datamodule", None), trainer.lightning_module)
    describe = next((d for owner in owners if (d := getattr(owner, "describe_sample", None)) is not None), None)
    if describe is None:
        return None
    try:
        return [[str(describe(batch, sample)) for sample in range(batch_size(batch))] for batch in step.batches]
    except Exception:  # whatever the user's method raises: the samples have their positions
        return None


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Whatever fails in recording, the run continues."""
    try:
        yield
    except Exception as error:
        warn_always(f"IncidentReport: {what} was not recorded: {_reason(error)}.", on_this_rank=True)


def explain(bad: BadStep, budget_seconds: float = 10.0) -> str:
    """Where the first non-finite value of a step was made, in a sentence, for the message of a stop."""
    ranks, several = bad.record.bad_loss_ranks, bad.trainer.world_size > 1
    if ranks and several and bad.trainer.global_rank not in ranks:
        return f"It came from rank {ranks[0]}."
    try:
        with bad.before():
            step = to_recorded_step(bad)
            described = _descriptions(bad.trainer, step)
            found = investigate(step, budget_seconds=budget_seconds, may_differ=several, descriptions=described)
    except Exception as error:  # the message is about the stop, whatever this fails with
        return f"Where it came from was not found: {_reason(error)}."
    if found.origin is None and several:
        return "Run again on this rank alone, the same step is finite: it came from another rank."
    if found.origin is None:
        return "Run again, the same step is finite: a transient fault, or something that is not recorded."
    sentence = one_sentence(found.origin)
    first = found.causes[0]
    remedy = first.remedy.splitlines()[0] if first.remedy else ""
    cause = "" if first.cause == "unknown" else f"\n  cause: {first.cause}: {first.summary}."
    return f"{sentence[0].upper()}{sentence[1:]}.{cause}" + (f"\n  remedy: {remedy}" if remedy and cause else "")


def to_recorded_step(bad: BadStep) -> RecordedStep:
    """What the session hands over, as the diagnosis takes it."""
    trainer, record, window = bad.trainer, bad.record, bad.window
    if window is None or not window.batches:
        why = "its window of accumulated batches is too long" if window else "they are of an earlier batch"
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
        trainer=_of_trainer(trainer),
        notes=_notes(bad),
        state=_state_within_a_batch(trainer, window) if isinstance(window, ManualWindow) else None,
        steps_before=window.steps_before if isinstance(window, ManualWindow) else 0,
        schedulers=_schedulers(trainer),
        extra_state=_extra_state(trainer, record),
    )


def _validation_step(trainer: Any, bad: ValidationBatch) -> RecordedStep:
    return RecordedStep(
        module=trainer.lightning_module,
        batches=[bad.batch],
        random_states=[bad.random],
        batch_indices=[bad.batch_idx],
        precision=str(trainer.precision_plugin.precision),
        failed="validation",
        optimizers=list(trainer.optimizers),
        trainer=_of_trainer(trainer) | {"training": False, "validating": True},
        validation_loader=bad.loader,
    )


def _of_trainer(trainer: Any) -> dict[str, Any]:
    values = {name: getattr(trainer, name, None) for name in _TRAINER}
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def _notes(bad: BadStep) -> list[str]:
    """What makes a replay inexact."""
    assert bad.window is not None
    changed = ["`training_step` changes its batch in place: the replay is not exact"]
    late = ["another update was made before this step's verdict was known: the weights are those after it"]
    return changed * bad.window.changed_in_place() + late * bad.is_late


def _state_within_a_batch(trainer: Any, window: ManualWindow) -> dict[str, Any]:
    """In manual optimization `training_step` is under way: what it has changed so far is told from what it was."""
    module = trainer.lightning_module
    state = capture_state(module, trainer.optimizers, copies=False)
    trained = trained_before_toggle(module)
    state["requires_grad"] = {name: trained.get(id(p), p.requires_grad) for name, p in module.named_parameters()}
    state["buffers"] |= window.buffers_before
    return state


def _schedulers(trainer: Any) -> list[int]:
    """The optimizer of each scheduler, by its index."""
    of_each = [getattr(config.scheduler, "optimizer", None) for config in trainer.lr_scheduler_configs]
    indices = (next((i for i, o in enumerate(trainer.optimizers) if o is optimizer), 0) for optimizer in of_each)
    return list(indices) if trainer.optimizers else []


def _extra_state(trainer: Any, record: StepRecord) -> dict[str, Any]:
    """The states of schedulers and of GradScaler; a replay does not need them."""
    extra: dict[str, Any] = {}
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        extra["scaler"] = scaler.state_dict() | {"scale": record.loss_scale}
    try:
        states = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        extra["schedulers"] = to_plain(states, "schedulers")
    except NotPlainError:  # a custom one's, with objects in it
        extra["schedulers"] = []
    return extra


def history_row(record: StepRecord) -> dict[str, Any]:
    """One step as history.jsonl has it; a number that is not finite is a word, because JSON has none."""
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


def _place(record: StepRecord) -> str:
    return f"epoch {record.epoch}, batch {record.batch_idx}, global step {record.step}"


def _failed(record: StepRecord) -> str:
    if record.outcome == Outcome.REJECTED:
        return REJECTED
    if not record.loss_finite or record.bad_loss_ranks:
        return "loss"
    if record.nonfinite_buffer is not None:
        return "buffer"
    return "gradient" if not record.gradients_finite else "weight"


def _details(record: StepRecord) -> dict[str, Any]:
    names = ("step", "logger_step", "epoch", "batch_idx", "batch_number", "outcome", "skipped_by", "nonfinite_buffer")
    return {name: getattr(record, name) for name in names} | {"ranks": list(record.bad_loss_ranks)}
