"""An option of the wrong kind is refused where it is given, in one sentence that names it and what was expected."""

from __future__ import annotations

from typing import Any

import pytest

import lightning_stability
from lightning_stability._compat import MisconfigurationException

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("NaNEarlyStop", {"monitor": 3}, "a name, or a list of names"),
    ("NaNEarlyStop", {"monitor": ["val_loss", 3]}, "a name, or a list of names"),
    ("GradNormMonitor", {"log_update_ratio": "no"}, "True or False"),
    ("FractionalCheckpoint", {"async_save": "no"}, "True or False"),
    ("FractionalCheckpoint", {"skip_by_loading": 3}, "True or False"),
    ("FractionalCheckpoint", {"dirpath": 3}, "a path, or None"),
    ("FractionalCheckpoint", {"allow_nonfinite": 3}, "a name, or a list of names"),
    ("InputCheck", {"max_abs": "1e3"}, "a number above 0, or None"),
    ("InputCheck", {"max_scale_ratio": None}, "a finite number above 1"),
    ("IncidentReport", {"dirpath": 3}, "a path, or None"),
    ("IncidentReport", {"save_state": "no"}, "True or False"),
    ("IncidentReport", {"budget_seconds": "10"}, "a number of at least 0"),
]


@pytest.mark.parametrize(("name", "options", "expected"), WRONG)
def test_an_option_of_the_wrong_kind_is_refused_and_the_error_says_what_was_expected(
    name: str, options: dict[str, Any], expected: str
) -> None:
    ((option, value),) = options.items()
    with pytest.raises(MisconfigurationException) as error:
        getattr(lightning_stability, name)(**options)
    assert str(error.value) == f"{name}({option}={value!r}): expected {expected}."


def test_what_counts_as_a_flag_a_name_or_a_number_is_accepted() -> None:
    import numpy

    lightning_stability.GradNormMonitor(log_update_ratio=numpy.bool_(True))
    assert lightning_stability.NaNEarlyStop(monitor=None).monitor == []
    assert lightning_stability.NaNEarlyStop(monitor=("a", "b")).monitor == ["a", "b"]
    assert lightning_stability.FractionalCheckpoint(allow_nonfinite="queue.*").allow_nonfinite == ["queue.*"]
    lightning_stability.InputCheck(max_abs=numpy.float32(1e3))
