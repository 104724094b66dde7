"""Every program of the zoo is trained, and the origin of its failure found: phase, module and line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_stability import IncidentReport
from lightning_stability.diagnosis.search import find_origin
from tests.zoo import catalogue, fill_value
from tests.zoo.catalogue import FAILURES, HEALTHY
from tests.zoo.program import WHERE
from tests.zoo.recording import record


def train(name: str, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    program = catalogue.program(name, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return program, record(program)[0]


def group_norm_overflows() -> bool:
    """Whether one huge number is too much for it; newer ones sum up otherwise."""
    torch.manual_seed(0)
    maps = torch.randn(1, 8, 8, 8)
    maps[0, :, 3, 3] = fill_value.LAND
    return not bool(torch.nn.functional.group_norm(maps, 2).isfinite().all())


def check(name: str, seed: int) -> None:
    program, step = train(name, seed)
    assert step is not None, "nothing went wrong"
    if name == "fill_value" and group_norm_overflows():
        pytest.skip("the group_norm of this torch (2.7, say) overflows already, so the origin is there")
    expected = program.expected
    origin = find_origin(step)
    if not expected.mark:
        assert origin is None, "a replay is finite"
        return
    assert origin is not None
    found = (origin.phase, Path(origin.file or "").name, origin.line)
    assert found == (expected.phase, Path(expected.file).name, expected.line), origin
    assert origin.module in (expected.module if isinstance(expected.module, tuple) else (expected.module,)), origin
    assert origin.code.endswith(expected.mark)
    if expected.tensor is not None:
        assert origin.tensor == expected.tensor
    if expected.samples is not None:
        assert origin.samples == expected.samples


@pytest.mark.parametrize("name", FAILURES)
def test_the_origin_of_a_failure_is_found(name):
    check(name, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", FAILURES)
def test_it_is_found_wherever_the_seed_puts_it(name, seed):
    check(name, seed)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_gives_no_incident(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step, _ = record(catalogue.program(name, 0), [IncidentReport(tmp_path)])
    assert step is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_says_what_its_cause_is(name):
    expected = catalogue.program(name, 0).expected
    assert expected.causes
    assert set(expected.causes) <= set(WHERE)
    assert all(expected.fault(word) for word in expected.causes if WHERE[word])
