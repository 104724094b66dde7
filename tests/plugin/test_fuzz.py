"""Whatever the module, the batches and the loop are, the run ends as it would without the package.

A fault is injected into a hook of ours in half of the runs. `python -m tests.plugin.fuzz SEED` shows one of them.
"""

import pytest

from tests.plugin.fuzz import LOOPS, Case, differences
from tests.plugin.strange import BATCHES, PARTS

FAST, SLOW, CHUNK = 40, 2000, 100


@pytest.mark.parametrize("seed", range(FAST))
def test_a_strange_run_ends_as_it_does_without_the_package(seed: int) -> None:
    assert differences(Case.of(seed)) == []


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FAST, FAST + SLOW, CHUNK))
def test_many_strange_runs_end_as_they_do_without_the_package(first: int) -> None:
    found = {seed: differences(Case.of(seed)) for seed in range(first, first + CHUNK)}
    assert {seed: lines for seed, lines in found.items() if lines} == {}


def test_the_runs_are_of_all_kinds() -> None:
    cases = [Case.of(seed) for seed in range(FAST + SLOW)]
    assert sum(case.fault is not None for case in cases) > 900
    assert len({case.fault[:2] for case in cases if case.fault}) > 140
    assert {case.loop for case in cases} == set(LOOPS)
    assert {case.batch for case in cases} == set(BATCHES)
    assert {part for case in cases for part in case.parts} == set(PARTS)
