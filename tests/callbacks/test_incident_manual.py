"""Incidents of runs with manual optimization: recorded in the middle of `training_step`, replayed to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_stability import IncidentReport, NaNEarlyStop
from lightning_stability.diagnosis import diagnose, read_incident
from tests import runs
from tests.callbacks import manual

KINDS = [manual.TwoOptimizers, manual.SeveralCriticSteps, manual.Closures, manual.Accumulating]
pytestmark = pytest.mark.usefixtures("brief")
LINE = next(n for n, line in enumerate(Path(manual.__file__).read_text().splitlines(), 1) if line.endswith("# here"))


def fit(kind: type[manual.ByHand], callbacks: list[Any], **options: Any) -> Any:
    torch.manual_seed(0)
    module = kind()
    runs.trainer(pl, callbacks=callbacks, **options).fit(module, manual.data())
    return module


def the_incidents(path: Path) -> list[Path]:
    """Where gradients accumulate, both optimizers are given bad ones."""
    return sorted((path / "incidents").iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*KINDS, manual.PlainBackward])
def test_a_step_by_hand_is_recorded_and_its_origin_found(kind, tmp_path):
    fit(kind, [IncidentReport(tmp_path), NaNEarlyStop(patience=3)])
    folders = the_incidents(tmp_path)
    assert len(folders) == (2 if kind is manual.Accumulating else 1)
    for folder in folders:
        report = json.loads((folder / "report.json").read_text())
        origin = report["origin"]
        assert (report["reproduced"], report["failed"]) == (True, "gradient")
        assert (origin["phase"], origin["op"], origin["line"]) == ("backward", "sqrt", LINE)
        assert report["notes"] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_its_replay_gives_the_same_loss_bits(kind, tmp_path):
    fit(kind, [IncidentReport(tmp_path, budget_seconds=0), NaNEarlyStop(patience=3)])
    for folder in the_incidents(tmp_path):
        incident = read_incident(folder)
        assert len(incident.about["losses"]) == (3 if kind is manual.Accumulating else 1)
        assert all(incident.state["requires_grad"].values())
        report = diagnose(folder)
        assert (report["reproduced"], report["exact"], report["origin"]["line"]) == (True, True, LINE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_by_hand_that_continues_is_bit_equal_to_one_without(kind, tmp_path):
    with_report = fit(kind, [IncidentReport(tmp_path), NaNEarlyStop(patience=3)])
    without = fit(kind, [NaNEarlyStop(patience=3)])
    assert the_incidents(tmp_path)
    ours, theirs = with_report.state_dict(), without.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for one, other in zip(with_report.trainer.optimizers, without.trainer.optimizers, strict=True):
        assert str(one.state_dict()) == str(other.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_a_stop_of_a_run_by_hand_says_where_it_came_from():
    with pytest.warns(UserWarning, match="NaNEarlyStop ended the run") as caught:
        fit(manual.TwoOptimizers, [NaNEarlyStop(patience=0)])
    [said] = [str(w.message) for w in caught if "ended the run" in str(w.message)]
    assert f"in the derivative of `sqrt`, {manual.__file__}:{LINE}".split(", ")[0] in said
    assert f"manual.py:{LINE}" in said
