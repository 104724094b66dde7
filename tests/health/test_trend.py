"""What counts as a rising norm."""

import json
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stability.health import ParameterGroups
from lightning_stability.health.trend import MEMORY_STEPS, NormTrend


def follow(trend: NormTrend, norms: list[float]) -> list[int]:
    """The steps at which a rise is called out; the second of two groups is the one that changes."""
    return [i for i, norm in enumerate(norms) if trend.update(norm, np.array([1.0, norm])) is not None]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 0.5), st.floats(-20, 20))
def test_noise_is_never_called_out(seed: int, deviation: float, level: float) -> None:
    logs = np.random.default_rng(seed).normal(level, deviation, size=500)
    assert follow(NormTrend(("still", "moving")), np.exp(logs).tolist()) == []


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 0.3), st.floats(1.2, 10.0))
def test_an_explosion_is_called_out_once_and_before_it_overflows(seed: int, deviation: float, factor: float) -> None:
    logs = np.random.default_rng(seed).normal(0, deviation, size=200)
    steps = int(math.log(1e19) / math.log(factor))
    norms = np.exp(logs).tolist() + [factor**i for i in range(1, steps)]
    called = follow(NormTrend(("still", "moving")), norms)
    assert len(called) == 1
    assert 200 <= called[0] < len(norms)
    assert norms[called[0]] < 1e6


def test_names_the_group_and_the_ratio_to_its_usual_norm() -> None:
    trend = NormTrend(("still", "moving"))
    follow(trend, [2.0] * 60)
    rises = [trend.update(20.0, np.array([1.0, 20.0])) for _ in range(3)]
    assert rises[:2] == [None, None]
    assert rises[2] is not None
    assert rises[2].group == "moving"
    assert math.isclose(rises[2].group_ratio, 10.0, rel_tol=1e-6)


def test_says_nothing_before_it_knows_what_is_usual() -> None:
    assert follow(NormTrend(("still", "moving")), [1.5**i for i in range(MEMORY_STEPS)]) == []


def test_a_new_level_is_accepted_in_time() -> None:
    trend = NormTrend(("still", "moving"))
    assert len(follow(trend, [1.0] * 100 + [10.0] * 400)) == 1
    assert follow(trend, [10.0] * 100) == []
    assert len(follow(trend, [100.0] * 10)) == 1


def test_state_goes_through_json() -> None:
    norms = [1.0, 1.2, 0.8] * 30 + [5.0] * 2
    one, other = NormTrend(("still", "moving")), NormTrend(("still", "moving"))
    follow(one, norms)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert follow(other, [5.0]) == follow(one, [5.0]) == [0]
    assert other.state_dict() == one.state_dict()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 70), st.integers(1, 70))
def test_groups_are_followed_together_as_one_by_one(seed: int, steps: int, more: int) -> None:
    """Saving after each step works each one's groups out alone; some groups have no gradient in some steps."""
    generator = np.random.default_rng(seed)
    rows = np.exp(generator.normal(size=(steps + more, 3)))
    rows[generator.random(rows.shape) < 0.2 * (seed % 2)] = 0.0
    together, one_by_one = NormTrend(("a", "b", "c")), NormTrend(("a", "b", "c"))
    for row in rows:
        total = float(np.sqrt((row**2).sum()))
        together.update(total, row)
        one_by_one.update(total, row)
        one_by_one.state_dict()
    means = (trend.state_dict()["group_means"] for trend in (together, one_by_one))
    np.testing.assert_allclose(*means, rtol=1e-9, atol=1e-12)


def test_the_groups_norms_are_made_of_the_parameters() -> None:
    groups = ParameterGroups(("a.x", "b.x", "a.y"), group_depth=1)
    trend = NormTrend(groups.names, groups.norms)
    for _ in range(60):
        trend.update(13.0, np.array([3.0, 12.0, 4.0]))
    rises = [trend.update(51.0, np.array([30.0, 12.0, 40.0])) for _ in range(3)]
    assert rises[2] is not None
    assert (rises[2].group, rises[2].group_ratio) == ("a", 10.0)
