"""On a GPU, where the host hears of a step one step late: the same incidents, and runs that continue as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_stability import IncidentReport, NaNEarlyStop, PrecisionFallback
from lightning_stability.diagnosis import diagnose, read_incident
from tests.callbacks.test_incident_report import Watcher, adamw, folders, fused
from tests.recovery import poison

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = {3: "nan_input", 5: "nan_gradient", 8: "large_input", 9: "inf_loss"}
RESULTS = ("weights", "optimizers", "metrics", "rates", "step", "random", "precision")


def train(pl: Any, kinds: dict[int, str], callbacks: list[Any], optimizer: Any, **options: Any) -> Any:
    module = poison.make_module(pl, kinds, optimizer, by_hand=False)
    return poison.fit(pl, module, callbacks, accelerator="gpu", **options)


@pytest.mark.parametrize("optimizer", [adamw, fused])
@pytest.mark.parametrize("kind", ["nan_input", "nan_gradient", "inf_loss"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_state_is_that_from_before_the_window(one, tmp_path, optimizer, kind, accumulate):
    watcher = Watcher(one)
    callbacks = [watcher, IncidentReport(tmp_path), NaNEarlyStop(patience=2)]
    train(one, {3: kind}, callbacks, optimizer, accumulate_grad_batches=accumulate)
    [folder] = folders(tmp_path)
    incident = read_incident(folder)
    assert incident.about["notes"] == []
    expected = watcher.states[int(folder.name.removeprefix("1-step"))]
    on_host = {name: _on_host(expected[name]) for name in expected}
    assert poison.differences({name: incident.state[name] for name in expected}, on_host) == []
    again = diagnose(folder, module=lambda: poison.make_module(one, {3: kind}, optimizer, by_hand=False))
    assert (again["reproduced"], again["exact"]) == (True, True)


@pytest.mark.parametrize("optimizer", [adamw, fused])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_continues_is_bit_equal_to_one_without(one, tmp_path, optimizer, precision, accumulate):
    results = []
    for report in ([IncidentReport(tmp_path, max_incidents=4)], []):
        callbacks = [*report, NaNEarlyStop(patience=2), *([PrecisionFallback()] if precision == "16-mixed" else [])]
        options = {"precision": precision, "accumulate_grad_batches": accumulate}
        results.append(train(one, KINDS, callbacks, optimizer, **options))
    assert folders(tmp_path) != []
    assert poison.differences(*[{name: result[name] for name in RESULTS} for result in results]) == []


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return [_on_host(item) for item in value] if isinstance(value, list) else value
