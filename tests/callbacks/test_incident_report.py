"""What IncidentReport makes of a step that the session hands over."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lightning_stability._compat import MisconfigurationException
from lightning_stability.callbacks.incident_report import IncidentReport, explain
from lightning_stability.diagnosis import diagnose
from lightning_stability.diagnosis.step import RecordedStep
from lightning_stability.health import StepRecord
from tests.diagnosis import augmented
from tests.zoo.recording import record


@dataclass
class HandedOver:
    """A bad step in the session's form."""

    record: StepRecord
    batches: list[Any]
    batch_indices: list[int]
    losses: list[float]
    random_states: list[Any]
    state: Any
    module: Any
    optimizer: Any
    trainer: Any


def handed_over(step: RecordedStep, trainer: Any) -> HandedOver:
    row = StepRecord(1, 1, 0, 0, 3, ("w",), np.array([float("nan")]), loss=0.7, outcome="bad")
    return HandedOver(
        row, step.batches, step.batch_indices, step.losses, step.random_states,
        lambda: step.state, step.module, trainer.optimizers[0], trainer,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bad() -> HandedOver:
    torch.manual_seed(0)
    program = augmented.program(0)
    step, _ = record(program)
    return handed_over(step, program.module.trainer)


def test_an_incident_is_written_with_its_report(bad, tmp_path):
    callback = IncidentReport(tmp_path)
    callback.on_record(bad.record)
    callback.on_bad_step(bad)
    folder = tmp_path / "incidents" / "1-step1"
    report = json.loads((folder / "report.json").read_text())
    assert report["origin"]["op"] == "sqrt"
    assert json.loads((folder / "history.jsonl").read_text())["grad_norms"] == {"w": "nan"}
    again = diagnose(folder)
    assert (again["reproduced"], again["exact"]) == (True, True)
    assert again["origin"] == report["origin"]


def test_a_resumed_run_counts_the_incidents_of_the_first(bad, tmp_path):
    callback = IncidentReport(tmp_path, max_incidents=1, save_state=False, budget_seconds=0)
    callback.on_bad_step(bad)
    resumed = IncidentReport(tmp_path, max_incidents=1)
    resumed.load_state_dict(callback.state_dict())
    resumed.on_bad_step(bad)
    assert len(list((tmp_path / "incidents").iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_warned_of(bad, tmp_path):
    (tmp_path / "incidents").write_text("")
    with pytest.warns(UserWarning, match="could not be written"):
        IncidentReport(tmp_path, budget_seconds=0).on_bad_step(bad)


def test_a_stop_says_where_it_came_from(bad):
    said = explain(bad)
    assert said.startswith("The first non-finite value was made in the derivative of `sqrt`, ")
    assert f"augmented.py:{augmented.program(0).expected.line}, samples 0, 1" in said


def test_a_stop_says_why_the_origin_was_not_looked_for(bad):
    assert explain(bad, budget_seconds=0) == (
        "Where it came from was not looked for: the time given for the diagnosis was up."
    )


@pytest.mark.parametrize("options", [{"max_incidents": 0}, {"budget_seconds": -1.0}])
def test_a_number_out_of_its_range_is_refused(options):
    with pytest.raises(MisconfigurationException):
        IncidentReport(**options)
