"""What a confidence means, and the figures of the zoo at length."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from tests.zoo.calibration import PLOT, as_svg, buckets, first_looks
from tests.zoo.catalogue import FAILURES
from tests.zoo.table import judge


def test_of_causes_said_with_09_nine_in_ten_were_right_at_first_sight():
    sure = [row for row in first_looks() if row["confidence"] >= 0.9]
    assert len(sure) > 200
    assert sum(row["cause_right"] for row in sure) >= 0.9 * len(sure)


def test_the_plot_in_the_docs_is_of_the_first_looks_that_are_kept():
    assert PLOT.read_text() == as_svg(buckets(first_looks()))


@pytest.mark.slow
def test_with_a_seed_that_was_never_looked_at_the_zoo_is_right_as_often_as_it_says():
    rows = [asdict(judge(name, seed=3)) for name in FAILURES]
    assert sum(row["cause_right"] for row in rows) >= 0.95 * len(rows)
    assert sum(row["where_right"] for row in rows) >= 0.9 * len(rows)
    sure = [row for row in rows if row["confidence"] >= 0.9]
    assert sum(row["cause_right"] for row in sure) >= 0.9 * len(sure)
