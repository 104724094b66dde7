"""What counts as a rising norm."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stability.health import ParameterGroups
from lightning_stability.health.trend import NormTrend


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


SETTINGS = [
    (start, deviation, length)
    for start in (0, 7, 30, 50, 120, 300)
    for deviation in (0.05, 0.2, 0.5)
    for length in (10, 40, 99)
]


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_a_rise_by_100_within_100_steps_is_seen(tails: str) -> None:
    """Wherever it begins and however slow it is: 99 steps are 1.05 a step. `benchmarks/norm_trend.py` has the grid."""
    seen = {}
    for start, deviation, length in SETTINGS:
        random = np.random.default_rng([start, length])
        runs = []
        for _ in range(20):
            noise = random.normal(size=start + 100) if tails == "normal" else random.standard_t(3, size=start + 100)
            rise = math.log(100) * np.minimum(np.arange(1, 101) / length, 1)
            logs = deviation * noise + np.concatenate([np.zeros(start), rise])
            called = follow(NormTrend(("still", "moving")), np.exp(logs).tolist())
            runs.append(any(step >= start for step in called))
        seen[start, deviation, length] = sum(runs) / len(runs)
    assert min(seen.values()) >= 0.95, seen


def test_10_000_healthy_steps_give_at_most_one_warning() -> None:
    for seed, noise in enumerate(("normal", "heavy", "spikes", "wandering")):
        random = np.random.default_rng(seed)
        logs = 0.5 * random.normal(size=30_000)
        if noise == "heavy":
            logs = 0.5 * random.standard_t(3, size=30_000)
        elif noise == "spikes":
            logs += 3.0 * (random.random(30_000) < 0.02)
        elif noise == "wandering":
            for step in range(1, 30_000):
                logs[step] = 0.8 * logs[step - 1] + 0.6 * logs[step]
        assert len(follow(NormTrend(("still", "moving")), np.exp(logs).tolist())) <= 3, noise


def test_slow_changes_of_a_healthy_run_are_not_called_out() -> None:
    steps = np.arange(2000.0)
    for course in (30.0 ** np.maximum(1 - steps / 200, 0), 1 + steps / 100, 3.0 ** (steps % 150 / 150)):
        norms = course * np.exp(np.random.default_rng(0).normal(0, 0.3, size=2000))
        assert follow(NormTrend(("still", "moving")), norms.tolist()) == []


def test_the_group_is_compared_with_its_norm_from_before_a_slow_rise() -> None:
    trend, rises = NormTrend(("still", "moving", "silent")), []
    for step in range(300):
        norm = 1.05 ** max(0, step - 200)
        rises.append(trend.update(norm, np.array([1.0, norm, 0.0])))
    [rise] = [rise for rise in rises if rise is not None]
    assert rise.group == "moving"
    assert rise.group_ratio == pytest.approx(rise.ratio, rel=0.5)
    assert rise.ratio > 5


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
@given(st.integers(0, 10_000), st.integers(1, 250), st.integers(1, 70))
def test_saving_after_each_step_changes_nothing(seed: int, steps: int, more: int) -> None:
    generator = np.random.default_rng(seed)
    rows = np.exp(generator.normal(size=(steps + more, 3)))
    rows[generator.random(rows.shape) < 0.2 * (seed % 2)] = 0.0  # some groups have no gradient in some steps
    totals = np.sqrt((rows**2).sum(axis=1)).tolist()
    unsaved, saved = NormTrend(("a", "b", "c")), NormTrend(("a", "b", "c"))
    for total, row in zip(totals, rows, strict=True):
        rise = unsaved.update(total, row)
        state = json.loads(json.dumps(saved.state_dict()))
        saved = NormTrend(("a", "b", "c"))
        saved.load_state_dict(state)
        assert saved.update(total, row) == rise
    np.testing.assert_equal(saved.state_dict(), unsaved.state_dict())


@pytest.mark.parametrize("names", [["a", "b"], ["a"]])
def test_a_state_of_the_older_rule_or_of_other_groups_is_dropped(names: list[str]) -> None:
    older = {"group_names": names, "count": 60, "mean": 0.1, "variance": 0.2, "group_means": [0.0] * len(names)}
    trend = NormTrend(("a", "b"))
    trend.load_state_dict({**older, "steps_above": 0, "rising": False})
    assert trend.state_dict() == NormTrend(("a", "b")).state_dict()


def test_the_groups_norms_are_made_of_the_parameters() -> None:
    groups = ParameterGroups(("a.x", "b.x", "a.y"), group_depth=1)
    trend = NormTrend(groups.names, groups.norms)
    for _ in range(60):
        trend.update(13.0, np.array([3.0, 12.0, 4.0]))
    rises = [trend.update(100.7, np.array([60.0, 12.0, 80.0])) for _ in range(3)]
    assert rises[2] is not None
    assert (rises[2].group, rises[2].group_ratio) == ("a", 20.0)
