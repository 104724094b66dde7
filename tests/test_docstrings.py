"""The examples in the docstrings of the runtime, the record and the callbacks run as they are written."""

import doctest
import importlib

import pytest

MODULES = (
    "lightning_stability.callbacks.grad_norm_monitor",
    "lightning_stability.events",
    "lightning_stability.health.late_reads",
    "lightning_stability.health.record",
    "lightning_stability.health.trend",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
