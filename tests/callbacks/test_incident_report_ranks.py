"""IncidentReport in a run of two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_stability.diagnosis import DiagnosisError, diagnose, read_incident
from tests import runs
from tests.distributed_guard import Sharded
from tests.distributed_incident import KINDS, adamw
from tests.recovery import poison
from tests.test_distributed import two_ranks

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "distributed_incident.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, two_ranks(folder, "ddp", "pytorch_lightning", launch_both=True, script=SCRIPT)


def test_the_rank_that_went_wrong_writes_the_incident_and_the_run_continues_as_without(ranks):
    folder, results = ranks
    assert [result["differences"] for result in results] == [[], []]
    loss, gradient = sorted((folder / "incidents").iterdir())
    assert (loss.name, gradient.name) == ("1-step2-rank1", "2-step5-rank1")
    assert read_incident(loss).about["details"]["ranks"] == [1]
    report = json.loads((gradient / "report.json").read_text())
    assert (report["reproduced"], report["origin"]["op"]) == (True, "sqrt")
    # replayed alone, in one process
    pl: Any = runs.load_namespace("pytorch_lightning")
    again = diagnose(gradient, module=lambda: poison.make_module(pl, KINDS, adamw, by_hand=False))
    assert (again["reproduced"], again["exact"]) == (True, True)


def test_a_rank_that_is_fine_says_that_another_one_is_not(ranks):
    first, second = ranks[1]
    assert second["said"] == []
    [said] = first["said"]
    assert "origin: Run again on this rank alone, the same step is finite: it came from another rank." in said


def test_of_sharded_parameters_the_report_says_why_no_replay(tmp_path):
    results = two_ranks(tmp_path, "fsdp2", "pytorch_lightning", launch_both=True, script=SCRIPT)
    assert results[0] == results[1]  # the run has gone on
    pl: Any = runs.load_namespace("pytorch_lightning")
    folders = sorted((tmp_path / "incidents").iterdir())
    assert folders[0].name == "1-step2-rank1"
    for folder in folders:
        report = json.loads((folder / "report.json").read_text())
        assert report["reproduced"] is None
        assert report["notes"] == ["the parameters are sharded over several ranks; a replay needs all of them on one"]
    again = {"module": lambda: poison.make_module(pl, KINDS, adamw, by_hand=False, net=Sharded)}
    with pytest.raises(DiagnosisError, match="the parameters are sharded over several ranks"):
        diagnose(folders[0], **again)
