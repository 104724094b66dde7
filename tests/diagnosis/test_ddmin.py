"""Delta debugging finds a part that is enough, of which nothing can be left out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_stability.diagnosis.ddmin import ddmin

SETS = st.lists(st.sets(st.integers(0, 19), max_size=5), min_size=1, max_size=4)


@given(SETS, st.integers(20, 60))
def test_nothing_can_be_left_out_of_what_it_returns(sets, count):
    """What is enough is any of some sets, with whatever else beside it."""

    def is_enough(part):
        return any(needed <= set(part) for needed in sets)

    found = ddmin(range(count), is_enough)
    assert is_enough(found)
    assert not any(is_enough([other for other in found if other != item]) for item in found)


@given(st.sets(st.integers(0, 63), min_size=1, max_size=8))
def test_the_only_set_that_is_enough_is_found(needed):
    assert ddmin(range(64), lambda part: needed <= set(part)) == sorted(needed)


@given(st.sets(st.integers(0, 40), min_size=1), st.data())
def test_no_part_is_asked_for_twice(needed, data):
    """Also where a part that is enough becomes one that is not when something joins it."""
    asked = []

    def is_enough(part):
        asked.append(tuple(part))
        return len(part) == 41 or data.draw(st.booleans())

    found = ddmin(range(41), is_enough)
    assert len(asked) == len(set(asked))
    assert found == sorted(found)


def test_one_of_a_thousand_takes_few_questions():
    asked = []
    assert ddmin(range(1000), lambda part: (asked.append(part), 617 in part)[1]) == [617]
    assert len(asked) <= 1 + 2 * 10


def test_where_nothing_is_needed_nothing_is_returned():
    assert ddmin([1, 2, 3], lambda part: True) == []
