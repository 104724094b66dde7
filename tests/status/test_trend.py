"""The trend as arithmetic: what has to hold for any series."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stability.status.trend import WINDOW, in_words, trend

VALUES = st.lists(st.floats(1e-6, 1e6), min_size=6, max_size=WINDOW)


@given(VALUES)
def test_read_backwards_it_is_the_inverse(values: list[float]) -> None:
    assert trend(values[::-1]) == pytest.approx(1 / trend(values), rel=1e-9)


@given(VALUES, st.floats(1e-3, 1e3))
def test_another_unit_changes_nothing(values: list[float], factor: float) -> None:
    assert trend([factor * value for value in values]) == pytest.approx(trend(values), rel=1e-9)


@given(st.floats(0.9, 1.1), st.integers(6, WINDOW))
def test_a_constant_growth_is_found_exactly(growth: float, count: int) -> None:
    between_thirds = count - count // 3  # steps from the middle of the first third to that of the last
    assert trend([growth**step for step in range(count)]) == pytest.approx(growth**between_thirds, rel=1e-6)


@given(VALUES, st.data())
def test_one_outlier_does_not_take_it_beyond_what_the_other_values_say(
    values: list[float], data: st.DataObject
) -> None:
    values = [*values, *values, *values][: max(9, len(values))]  # thirds of three at least
    place = data.draw(st.integers(0, len(values) - 1))
    outlier = data.draw(st.sampled_from([1e-30, 1e30]))
    changed = trend([*values[:place], outlier, *values[place + 1 :]])
    rest = values[:place] + values[place + 1 :]
    assert min(rest) / max(rest) * (1 - 1e-9) <= changed <= max(rest) / min(rest) * (1 + 1e-9)


@settings(max_examples=30)
@given(VALUES, VALUES)
def test_only_the_newest_values_count(old: list[float], new: list[float]) -> None:
    new = (new * WINDOW)[:WINDOW]
    assert trend(old + new) == trend(new)


@given(VALUES, st.lists(st.sampled_from([math.nan, math.inf, 0.0]), max_size=5), st.randoms())
def test_what_is_not_a_finite_norm_above_0_does_not_count(values, others, random) -> None:
    mixed = list(values)
    for other in others:
        mixed.insert(random.randint(0, len(mixed)), other)
    assert trend(mixed) == trend(values)


@given(VALUES)
def test_it_is_the_ratio_of_the_middles_of_the_thirds(values: list[float]) -> None:
    """Written another way: geometric medians."""
    third = len(values) // 3

    def middle(part: list[float]) -> float:
        low, high = statistics.median_low(part), statistics.median_high(part)
        return math.sqrt(low) * math.sqrt(high)

    assert trend(values) == pytest.approx(middle(values[-third:]) / middle(values[:third]), rel=1e-9)


def test_too_few_values_have_no_trend() -> None:
    assert trend([1.0] * 5) is None
    assert trend([1.0] * 6) == 1.0


def test_words() -> None:
    assert [in_words(factor) for factor in (0.79, 0.81, 1.24, 1.26)] == [
        "falling, x0.79",
        "steady",
        "steady",
        "rising, x1.26",
    ]
