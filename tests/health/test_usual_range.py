"""The usual range: what widens it, and what does not."""

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stability.health.usual_range import ENOUGH, UsualLoss, UsualRange

FEW = settings(max_examples=40)
SEEDS = st.integers(0, 10_000)


def filled(values: list[float], **options: object) -> UsualRange:
    usual = UsualRange(**options)  # type: ignore[arg-type]
    for value in values:
        usual.add(value)
    return usual


def noise(seed: int, count: int, mean: float = 2.0, std: float = 0.2) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(mean, std) for _ in range(count)]


@FEW
@given(SEEDS, st.integers(0, 199), st.floats(10.0, 1e30))
def test_one_spike_does_not_widen_the_range(seed: int, place: int, spike: float) -> None:
    values = noise(seed, 200)
    without = filled(values).limit
    values[place] = spike
    assert filled(values).limit <= without + 1.0


@FEW
@given(SEEDS, st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), min_size=1, max_size=50))
def test_what_is_not_finite_leaves_no_trace(seed: int, bad: list[float]) -> None:
    values = noise(seed, 150)
    mixed = values[:70] + bad + values[70:]
    for of_logs in (False, True):
        assert filled(mixed, of_logs=of_logs).limit == filled(values, of_logs=of_logs).limit


@FEW
@given(SEEDS, st.integers(0, ENOUGH - 1))
def test_there_is_no_limit_while_too_little_is_known(seed: int, count: int) -> None:
    assert filled(noise(seed, count)).limit == math.inf


@FEW
@given(SEEDS, st.floats(0.0, 0.5))
def test_a_run_that_only_varies_is_within_its_limit(seed: int, spread: float) -> None:
    usual = UsualRange(of_logs=True)
    generator = random.Random(seed)
    out = 0
    for _ in range(600):
        value = math.exp(generator.gauss(0.0, spread))
        out += value > usual.limit
        usual.add(value)
    assert out == 0


@FEW
@given(SEEDS)
def test_a_heavy_tail_is_not_called_a_spike_all_the_time(seed: int) -> None:
    usual = UsualRange()
    generator = random.Random(seed)
    out = 0
    for _ in range(1000):
        value = generator.paretovariate(2.0)
        out += value > usual.limit
        usual.add(value)
    assert out <= 15


@FEW
@given(SEEDS, st.floats(0.2, 5.0), st.floats(-0.01, 0.01))
def test_a_level_that_drifts_stays_within(seed: int, scale: float, drift: float) -> None:
    usual = UsualRange(of_logs=True)
    for step, value in enumerate(noise(seed, 600, mean=1.0, std=0.05)):
        shifted = scale * value * math.exp(drift * step)
        assert shifted <= usual.limit
        usual.add(shifted)


@FEW
@given(SEEDS, st.integers(0, 300), st.booleans())
def test_a_saved_range_continues_as_the_one_that_was_not(seed: int, count: int, of_logs: bool) -> None:
    values = noise(seed, 400)
    saved = UsualRange(of_logs=of_logs)
    saved.load_state_dict(filled(values[:count], of_logs=of_logs).state_dict())
    for value in values[count:]:
        saved.add(value)
    assert saved.limit == filled(values, of_logs=of_logs).limit


@FEW
@given(SEEDS)
def test_a_loss_that_falls_does_not_widen_the_range(seed: int) -> None:
    usual = filled([8.0 * math.exp(-step / 20) + value for step, value in enumerate(noise(seed, 200, std=0.02))])
    assert usual.limit < 2.5


def test_a_number_that_hardly_varies_has_room() -> None:
    usual = filled([1.0] * 128)
    assert math.isclose(usual.limit, 1.1)
    assert filled([0.0] * 128).limit > 0.0


def test_a_spike_of_a_negative_loss_is_above_it() -> None:
    usual = filled(noise(0, 128, mean=-50.0, std=1.0))
    assert -50.0 < usual.limit < -30.0


@given(SEEDS)
def test_a_loss_with_a_heavy_tail_is_hardly_ever_a_spike(seed: int) -> None:
    usual, out = UsualLoss(), 0
    generator = random.Random(seed)
    for _ in range(1000):
        value = generator.paretovariate(1.5)
        out += value > usual.limit
        usual.add(value)
    assert out <= 4


@given(SEEDS, st.integers(0, 200))
def test_losses_that_are_not_positive_are_judged_by_their_differences(seed: int, place: int) -> None:
    values = noise(seed, 201, mean=3.0)
    values[place] = -1.0
    usual = UsualLoss()
    for value in values:
        usual.add(value)
    assert usual.limit == filled(values).limit
    again = UsualLoss()
    again.load_state_dict(usual.state_dict())
    assert (again.limit, again.level) == (usual.limit, usual.level)


def test_a_share_of_the_way_to_the_limit_is_of_ratios_for_logarithms() -> None:
    usual = filled([2.0] * 128, of_logs=True)
    assert math.isclose(usual.towards_limit(0.5), 2.0 * math.sqrt(1.1))
    assert UsualRange().towards_limit(0.5) == math.inf
