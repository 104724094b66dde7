"""When a checkpoint is due, against plain arithmetic."""

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_stability.checkpointing.schedule import EpochCount, EpochSchedule

TENTHS = st.builds(Fraction, st.integers(1, 40), st.sampled_from([1, 3, 4, 7, 10, 12, 100]))


def optimizer_steps(lengths: list[int], accumulation: int) -> list[Fraction]:
    """Epochs trained at each optimizer step: Lightning steps at every window's end and at the epoch's last batch."""
    return [
        epoch + Fraction(batch, length)
        for epoch, length in enumerate(lengths)
        for batch in range(1, length + 1)
        if batch % accumulation == 0 or batch == length
    ]


def expected_saves(steps: list[Fraction], interval: Fraction) -> list[Fraction]:
    """For each k, the first step at or after k intervals; several k at one step are one save."""
    saves, k = [], 1
    while k * interval <= steps[-1]:
        first = next(step for step in steps if step >= k * interval)
        if first not in saves:
            saves.append(first)
        k += 1
    return saves


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    accumulation=st.integers(1, 9),
    interval=TENTHS,
    stops=st.sets(st.integers(1, 100), max_size=4),
)
@example(lengths=[7, 7, 7], accumulation=1, interval=Fraction(3, 10), stops={4})
@example(lengths=[10] * 6, accumulation=1, interval=Fraction(1, 10), stops=set())
@example(lengths=[7, 5, 9], accumulation=4, interval=Fraction(3, 2), stops={2})
def test_saves_are_those_of_plain_arithmetic_whatever_interrupts_the_run(
    lengths: list[int], accumulation: int, interval: Fraction, stops: set[int]
) -> None:
    steps = optimizer_steps(lengths, accumulation)
    schedule, saves = EpochSchedule(float(interval)), []
    for index, step in enumerate(steps):
        if schedule.is_due(step):
            saves.append(step)
        if index in stops:  # killed here, after a save at the end of fit, and resumed from it
            schedule = EpochSchedule(float(interval))
            schedule.start_at(step)
    assert saves == expected_saves(steps, interval)


def test_a_tenth_does_not_drift_in_a_thousand_epochs() -> None:
    schedule = EpochSchedule(0.1)
    saves = [epochs for epochs in (Fraction(step, 10) for step in range(1, 10_001)) if schedule.is_due(epochs)]
    assert len(saves) == 10_000


@pytest.mark.parametrize(
    ("interval", "digits"), [(0.25, 2), (0.5, 2), (0.125, 3), (1 / 3, 2), (0.001, 3), (1e-4, 4), (1 / 7000, 4), (2, 2)]
)
def test_names_have_as_many_digits_as_it_takes_to_tell_two_saves_apart(interval: float, digits: int) -> None:
    assert EpochSchedule(interval).digits == digits


def test_names_sort_by_time_and_say_an_epoch_only_when_it_is_whole() -> None:
    epochs = [Fraction(n, 300) for n in range(1, 3700)]
    names = [format(EpochCount.of(e, 2, max_epochs=12)) for e in epochs]
    assert names == sorted(names)
    assert format(EpochCount.of(Fraction(1, 4), 2, None)) == "000.25"
    assert format(EpochCount.of(Fraction(9999, 10000), 2, None)) == "000.99"
    assert format(EpochCount.of(Fraction(5, 2), 2, None), "02d") == "02"
    assert format(EpochCount.of(Fraction(5, 2), 2, None), ".1f") == "2.5"
    assert sorted(format(EpochCount.of(Fraction(e), 2, 2000)) for e in (999, 1000)) == ["0999.00", "1000.00"]
