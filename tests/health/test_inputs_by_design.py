"""What is not finite, or constant, because it is meant to be passes; what is so by fault does not."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.health.test_inputs import flags, meter, said

INF = math.inf


def batch_of(kind: str) -> torch.Tensor:
    """A (samples, channels, positions) tensor."""
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    if kind in ("mask", "no mask"):
        x = torch.zeros(4, 3, 5)
    if kind != "finite" and kind != "no mask":
        x[2, 1, 3:] = {"mask": -INF, "nan": math.nan, "-inf": -INF, "inf": INF}[kind]
    return x


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["finite", "no mask", "mask", "nan", "-inf", "inf"]), min_size=1, max_size=30))
def test_what_is_not_finite_is_flagged_unless_most_batches_before_were_so_or_it_is_a_mask(kinds: list[str]) -> None:
    watching = meter()
    for place, kind in enumerate(kinds):
        [stats] = watching.measure(batch_of(kind))
        held = sum(before in ("nan", "-inf", "inf") for before in kinds[:place])
        expected = kind in ("nan", "-inf", "inf") and place > 0 and place - held >= held
        assert ("is_nonfinite" in flags(stats)) == expected
        assert bool(said(stats)["is_mask"]) == (kind == "mask")
        assert said(stats)["nonfinite"] == (0 if kind in ("finite", "no mask") else 2)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["mask", "no mask"]), min_size=1, max_size=12))
def test_an_additive_mask_is_never_flagged_in_whatever_order(kinds: list[str]) -> None:
    watching = meter(max_abs=1.0)
    assert [flags(watching.measure(batch_of(kind))[0]) for kind in kinds] == [set()] * len(kinds)


@pytest.mark.parametrize("missing", [0.03, 0.1, 0.3])
def test_targets_that_code_what_is_missing_as_nan_are_taken_as_meant_after_two_flags_at_most(missing: float) -> None:
    """32 targets a batch: with 3 % missing, a third of the batches miss none, which must not condemn the others."""
    generator = torch.Generator().manual_seed(4)
    watching, flagged = meter(), 0
    for _ in range(200):
        y = torch.randn(32, generator=generator)
        y[torch.rand(32, generator=generator) < missing] = math.nan
        flagged += bool(flags(watching.measure(y)[0]))
    assert flagged <= 2


def test_a_bad_first_batch_passes_and_the_next_bad_one_does_not_once_most_were_fine() -> None:
    watching = meter()
    found = [flags(watching.measure(batch_of(kind))[0]) for kind in ("nan", "finite", "finite", "nan", "nan", "finite")]
    assert found == [set(), set(), set(), {"is_nonfinite"}, {"is_nonfinite"}, set()]


def test_a_recording_that_is_broken_is_flagged_each_time_it_comes() -> None:
    watching = meter()
    found = [bool(flags(watching.measure(batch_of("nan" if place % 4 == 3 else "finite"))[0])) for place in range(40)]
    assert found == [place % 4 == 3 for place in range(40)]


def test_a_sensor_that_dies_is_flagged_for_as_long_as_it_had_been_alive() -> None:
    watching = meter()
    found = [bool(flags(watching.measure(batch_of(kind))[0])) for kind in ["finite"] * 9 + ["nan"] * 20]
    assert found == [False] * 9 + [True] * 10 + [False] * 10


def among_zeros(value: float) -> torch.Tensor:
    x = batch_of("mask")
    x[0, 0, 0] = value
    return x


@pytest.mark.parametrize(
    "broken",
    [torch.full((4, 3, 5), math.nan), torch.full((4, 3, 5), -INF), among_zeros(INF), among_zeros(math.nan),
     batch_of("-inf")],
    ids=["all nan", "all -inf", "inf in a mask", "nan in a mask", "-inf beside other values"],
)  # fmt: skip
@pytest.mark.parametrize("before", ["finite", "mask"])
def test_only_minus_infinity_beside_nothing_but_0_is_a_mask(broken: torch.Tensor, before: str) -> None:
    watching = meter()
    watching.measure(batch_of(before))
    assert "is_nonfinite" in flags(watching.measure(broken)[0])


def test_rare_features_of_a_2d_batch_are_not_constant_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    watching = meter()
    for _ in range(20):
        x = (torch.rand(8, 50, generator=generator) < 0.05).float()
        [stats] = watching.measure(x)
        assert (flags(stats), stats.constant) == (set(), None)


def test_a_signal_of_zeros_is_constant_though_a_mask_of_zeros_is_not() -> None:
    watching = meter()
    watching.measure(batch_of("finite"))
    assert flags(watching.measure(torch.zeros(4, 3, 5))[0]) == {"is_constant"}


@pytest.mark.parametrize("kinds", [["nan", "nan", "finite", "nan"], ["finite", "nan", "mask"]])
def test_what_is_remembered_of_it_resumes(kinds: list[str]) -> None:
    for cut in range(len(kinds)):
        whole, first, second = meter(), meter(), meter()
        expected = [flags(whole.measure(batch_of(kind))[0]) for kind in kinds]
        for kind in kinds[:cut]:
            first.measure(batch_of(kind))
        second.load_state_dict(first.state_dict())
        assert [flags(second.measure(batch_of(kind))[0]) for kind in kinds[cut:]] == expected[cut:]


@pytest.mark.parametrize(("kind", "expected"), [("nan", [False, False]), ("finite", [False, True])])
def test_a_state_from_before_anybody_counted_is_loaded_and_the_next_batch_judged_as_a_first_one(
    kind: str, expected: list[bool]
) -> None:
    watching = meter()
    state: dict[str, Any] = {"scale": torch.tensor([7.0, 0.0, 0.0, 0.0], dtype=torch.float64), "batches": 7}
    watching.load_state_dict({"batch": {**state, "channels": torch.zeros(3, dtype=torch.int8)}})
    assert [bool(flags(watching.measure(batch_of(kind))[0])) for kind in (kind, "nan")] == expected
