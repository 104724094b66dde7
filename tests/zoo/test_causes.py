"""Every program of the zoo is diagnosed: its first-named cause, and where that is."""

from __future__ import annotations

import pytest

from tests.zoo.catalogue import FAILURES, held_out
from tests.zoo.table import judge

OPEN = [name for name in FAILURES if not held_out(name)]
OTHERS = [name for name in FAILURES if held_out(name)]


def check(name: str, seed: int) -> None:
    row = judge(name, seed)
    assert row.found in row.expected, row
    assert row.where_right, row
    assert row.summary


@pytest.mark.parametrize("name", OPEN)
def test_the_cause_of_a_failure_is_named_first(name):
    check(name, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", OPEN)
def test_it_is_named_wherever_the_seed_puts_it(name, seed):
    check(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_causes_of_programs_that_no_rule_was_made_with(name):
    check(name, seed=0)
