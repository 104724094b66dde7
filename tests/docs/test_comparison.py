"""The tables against everyone in benchmarks/README.md are those of the file that the benchmark wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks/results/compare_cpu.json"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from rivals import table

    yield table
    for name in [name for name in sys.modules if name.partition(".")[0] in ("rivals", "common")]:
        del sys.modules[name]


def test_the_tables_of_the_page_are_those_of_the_file(table):
    report = json.loads(RESULT.read_text())
    assert table.written(ROOT / "benchmarks/README.md") == table.render(report).strip("\n")


def test_the_table_has_at_least_eight_rivals(table):
    report = json.loads(RESULT.read_text())
    measured = [name for name, row in report["rows"].items() if "missing" not in row and name not in table.OURS]
    assert len(measured) >= 9, "a bare Trainer is none of the eight"


def test_no_row_of_faults_or_checkpoints_is_empty(table):
    report = json.loads(RESULT.read_text())
    measured = [row for row in report["rows"].values() if "missing" not in row]
    assert {tuple(row["faults"]) for row in measured} == {tuple(table.FAULTS)}
    assert {tuple(way) for way in report["saves"].values()} == {tuple(table.saves.FAULTS)}


def test_a_number_that_is_said_is_no_alarm(table):
    from rivals.faults import alarms

    assert alarms("Loss (avg): nan [stable]\nloss=nan") == []
    assert alarms("WARNING: the loss is NaN") == ["WARNING: the loss is NaN"]


def test_one_round_is_trained_however_little_time_is_left(table):
    from common.blocks import within

    go_on = within(3, deadline=0.0)
    assert go_on(0)
    assert not go_on(1)
    assert not within(3, deadline=float("inf"))(3)
