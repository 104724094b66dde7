"""Diagnosing an incident folder, on any machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric.utilities import move_data_to_device
from torch import nn

from lightning_stability.diagnosis.earlier import earlier_weights
from lightning_stability.diagnosis.environment import capture_environment, differences, settings_of
from lightning_stability.diagnosis.errors import DiagnosisError, memory_for
from lightning_stability.diagnosis.html import write_page
from lightning_stability.diagnosis.incident import Incident, read_incident, to_step
from lightning_stability.diagnosis.investigation import investigate
from lightning_stability.diagnosis.layers import measure_layers
from lightning_stability.diagnosis.rebuild import from_factory, make_optimizers, rebuild
from lightning_stability.diagnosis.replay import Outcome, Replay, make_precision, same_losses
from lightning_stability.diagnosis.replayed_module import give_trainer
from lightning_stability.diagnosis.report import make_report, write_report
from lightning_stability.diagnosis.repro import write_repro
from lightning_stability.diagnosis.search import trace_step
from lightning_stability.diagnosis.step import REJECTED, RecordedStep

Report = dict[str, Any]
Module = str | nn.Module | Callable[[], nn.Module]
_REPLAYS = 3


def diagnose(
    incident_dir: str | os.PathLike[str],
    module: Module | None = None,
    progress: Callable[[str], object] = lambda message: None,
    budget_seconds: float = 600.0,
) -> Report:
    """Run a recorded step again, find where its first non-finite value was made, and by experiment why.

    The report is also written into the folder, as `report.json`, `report.txt` and `report.html`, where that is
    possible, with a script `repro.py` that fails in the same way.

    Args:
        incident_dir: The incident's folder.
        module: The LightningModule, a function that makes it, or `"package.module:function"`. By default it is made
            from its recorded import path and hyperparameters.
        progress: Told what is done next.
        budget_seconds: For the search for causes; 0 leaves it out.

    Returns:
        The content of `report.json`.

    Raises:
        DiagnosisError: If the folder is no incident, or not as it was written, or the module cannot be made.

    Example:
        >>> diagnose("no_such_folder")
        Traceback (most recent call last):
        ...
        lightning_stability.diagnosis.errors.DiagnosisError: no_such_folder is no incident folder: ...
    """
    progress("reading the incident")
    with memory_for(f"read the incident {incident_dir}"):
        incident = read_incident(incident_dir)
    progress("making the module")
    recorded = incident.about["environment"]
    with settings_of(recorded), memory_for(f"run the step of {incident_dir} again, which is as it was"):
        step, notes = _rebuild(incident, module)
        report = _diagnose(step, notes, progress, incident, budget_seconds)
    try:
        write_report(incident.folder, report)
    except OSError as error:
        report["notes"].append(f"the report could not be written into the folder: {error}")
        return report
    progress("drawing the page")
    why_not = write_page(incident.folder, report)
    if why_not is not None:
        report["notes"].append(why_not)
    return report


def _diagnose(
    step: RecordedStep,
    notes: list[str],
    progress: Callable[[str], object],
    incident: Incident,
    budget_seconds: float,
) -> Report:
    device = next((p.device for p in step.module.parameters()), torch.device("cpu"))
    elsewhere = differences(step.environment, capture_environment(device))
    outcomes: list[Outcome] = []
    for number in range(_REPLAYS):
        progress(f"running the step again ({number + 1})")
        outcomes.append(Replay(step).run())
        if _is_same(step, outcomes[-1]) or step.failed == REJECTED:
            break
    reproduced = _is_same(step, outcomes[-1])
    exact = same_losses(step.losses, outcomes[-1].losses) if step.losses else None
    details: dict[str, Any] = {"differences": elsewhere, "replays": len(outcomes)}
    if not reproduced and step.failed != REJECTED:
        notes += _why_not(outcomes, elsewhere)
    elif exact is False and not elsewhere:
        notes.append("the losses of the replay are not the recorded bits, on the same machine")
    notes += [f"recorded elsewhere: {difference}" for difference in elsewhere]
    origin = None
    if budget_seconds and not (step.failed == REJECTED and not reproduced):
        progress("looking at every operation")
        findings = investigate(
            step,
            incident.history,
            budget_seconds,
            dataset_indices=incident.about["details"].get("dataset_indices"),
            descriptions=incident.about["details"].get("descriptions"),
            earlier=earlier_weights(incident),
            may_differ=bool(elsewhere or incident.left_out) or not _are_alike(outcomes),
            progress=progress,
        )
        origin = findings.origin
        details |= findings.as_json()
        notes += findings.notes
    elif any(outcome.failure for outcome in outcomes):
        progress("looking at every operation")
        origin, _ = trace_step(step)
    progress("measuring every layer")
    details["layers"] = measure_layers(step)
    if origin is not None:
        progress("making repro.py, and running it in a process of its own")
        details["repro"] = write_repro(incident.folder, step, origin)
    progress("done")
    return make_report(reproduced, origin, step.failed, notes, exact, **details)


def _rebuild(incident: Incident, module: Module | None) -> tuple[RecordedStep, list[str]]:
    about = incident.about
    made: Any = rebuild(about["module"], incident.folder) if module is None else from_factory(module)
    _complete(made, incident, about["trainer"])
    device = _device(about["environment"].get("device", "cpu"))
    plugin = make_precision(about["precision"], device.type)
    made = plugin.convert_module(made).to(device)
    notes = [f"{name} was not kept: {why}" for name, why in incident.left_out.items()]
    notes += about["notes"]
    if incident.state is None:
        notes.append("the weights are those that the module is made with")
    try:
        optimizers = make_optimizers(made)
    except Exception as error:  # whatever the user's method raises
        optimizers = []
        notes.append(f"the optimizer could not be made: {type(error).__name__}: {error}")
    step = to_step(incident, made, optimizers)
    step.batches = [move_data_to_device(batch, device) for batch in step.batches]
    if len(optimizers) <= step.optimizer:
        step.optimizer = 0
    return step, notes


def _complete(module: Any, incident: Incident, trainer: dict[str, Any]) -> None:
    """Make what a module makes outside of its constructor."""
    give_trainer(module, trainer, [])
    recorded = None if incident.state is None else set(incident.state["parameters"])
    try:
        module.configure_model()
        if recorded is not None and recorded != {name for name, _ in module.named_parameters()}:
            module.setup("fit")
    except Exception as error:  # whatever the user's methods raise
        raise DiagnosisError(f"The module could not be set up: {type(error).__name__}: {error}") from error


def _device(recorded: str) -> torch.device:
    if recorded == "cuda" and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def _is_same(step: RecordedStep, outcome: Outcome) -> bool:
    """Whether a replay fails as the recording did."""
    if outcome.failure is None:
        return False
    if step.failed == "loss" or outcome.failure.what == "loss":
        return step.failed in ("loss", "input", REJECTED) and outcome.failure.what == "loss"
    return True  # gradients, buffers and weights are judged in another order by those that record


def _are_alike(outcomes: list[Outcome]) -> bool:
    verdicts = {None if outcome.failure is None else outcome.failure.what for outcome in outcomes}
    losses = {tuple(map(str, outcome.losses)) for outcome in outcomes}
    return len(verdicts) == len(losses) == 1


def _why_not(outcomes: list[Outcome], elsewhere: list[str]) -> list[str]:
    if not _are_alike(outcomes):
        return [f"{len(outcomes)} replays differ among themselves: the step is not deterministic"]
    if elsewhere:
        return ["the difference may be that it was recorded elsewhere"]
    return ["the same step on the same machine is another one: the sign of a transient fault or a race"]


__all__ = ["DiagnosisError", "diagnose"]
