"""What InputMeter says of a batch, against plain float64 arithmetic."""

import ast
import dataclasses
import inspect
import math
import textwrap
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stability.health import input_rules, input_scan
from lightning_stability.health.input_rules import ADOPTED, FIELDS
from lightning_stability.health.inputs import InputMeter, TensorStats

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Item:
    x: torch.Tensor
    y: torch.Tensor


def meter(max_abs: float | None = None, ratio: float = 100.0) -> InputMeter:
    return InputMeter(max_abs, ratio)


def said(stats: TensorStats) -> dict[str, float]:
    return dict(zip(FIELDS, stats.row.tolist(), strict=True))


def flags(stats: TensorStats) -> set[str]:
    return {name for name in FIELDS if name.startswith("is_") and said(stats)[name]} - {"is_unwanted", "is_mask"}


X = torch.randn(4, 3, 5)
LABELS = torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        (X, ["batch"]),
        ((X, LABELS), ["batch[0]"]),
        ({"a": [X, {"b": X}], "n": LABELS, "s": ["x"]}, ["batch['a'][0]", "batch['a'][1]['b']"]),
        (Pair(X, LABELS), ["batch.x"]),
        (Item(X, X), ["batch.x", "batch.y"]),
        (LABELS, []),
        (torch.ones(3, dtype=torch.bool), []),
        ({"empty": torch.zeros(0, 3), "none": None}, []),
        (torch.zeros(3, 0, 4), []),
        (torch.zeros(2, 2, dtype=torch.complex64), []),
        (torch.eye(3).to_sparse(), []),
    ],
)
def test_floating_tensors_are_found_whatever_their_nesting_and_no_others(batch: Any, names: list[str]) -> None:
    assert [stats.name for stats in meter().measure(batch)] == names


shapes = st.one_of(
    st.just(()), st.tuples(st.integers(1, 9)), st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)
)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    shift=st.sampled_from([0.0, 1.0, 1e3]),
    bad=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_range_and_deviation_are_those_of_float64(
    shape: Any, seed: int, scale: float, shift: float, bad: int, dtype: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift * scale).to(dtype)
    for _ in range(bad):
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = [math.nan, -math.inf][seed % 2]
    [stats] = meter().measure(x)
    values = x.double().numpy()
    finite = values[np.isfinite(values)]
    row = said(stats)
    assert row["nonfinite"] == values.size - finite.size
    if finite.size:
        assert row["abs_max"] == np.abs(finite).max()
        largest = np.abs(finite).max()
        assert row["std"] == pytest.approx(finite.std(), rel=1e-4, abs=largest * 1e-6)
        assert row["mean"] == pytest.approx(finite.mean(), rel=1e-4, abs=largest * 1e-6)
    samples = values.reshape(shape[0] if shape else 1, -1)
    for sample, (peak, nonfinite, deviation) in zip(samples, stats.samples.tolist(), strict=True):
        kept = sample[np.isfinite(sample)]
        assert nonfinite == sample.size - kept.size
        if kept.size and finite.size:
            assert peak == np.abs(kept).max()
            expected = math.sqrt(np.mean((kept / largest - finite.mean() / largest) ** 2)) * largest if largest else 0.0
            assert deviation == pytest.approx(expected, rel=1e-4, abs=largest * 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_deviation_of_the_largest_values_is_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.full((2, 2, 3), largest, dtype=dtype)
    x[0] = -largest
    [stats] = meter().measure(x)
    assert said(stats)["std"] == pytest.approx(largest, rel=1e-6)
    assert said(stats)["abs_max"] == largest


def test_a_small_deviation_beside_a_large_mean_does_not_cancel() -> None:
    x = 1e6 + torch.randn(8, 2, 500)
    [stats] = meter().measure(x)
    assert said(stats)["std"] == pytest.approx(float(x.double().std(correction=0)), rel=1e-2)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e30, 0.0])
def test_equal_values_have_no_deviation_and_so_no_scale_that_could_jump(value: float) -> None:
    watching = meter()
    watching.measure(torch.randn(7, 3, 11))
    [stats] = watching.measure(torch.full((7, 3, 11), value))
    assert said(stats)["std"] == 0.0
    assert flags(stats) == {"is_constant"}


def test_what_does_not_lie_side_by_side_is_measured_the_same() -> None:
    x = torch.randn(4, 6, 5, 7)
    for other in (x.to(memory_format=torch.channels_last), x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        torch.testing.assert_close(meter().measure(other)[0].row, meter().measure(x)[0].row, equal_nan=True)


class TestFlags:
    def test_values_that_are_not_finite(self) -> None:
        x = X.clone()
        x[2, 1, 3] = math.nan
        watching = meter()
        watching.measure(X)
        [stats] = watching.measure(x)
        assert flags(stats) == {"is_nonfinite"}
        assert stats.samples[:, 1].tolist() == [0, 0, 1, 0]

    def test_magnitudes_above_max_abs_and_not_those_of_it(self) -> None:
        x = torch.zeros(4, 3)
        x[1] = torch.tensor([0.1, -0.05, 0.0])
        for max_abs, expected in ((0.1, set()), (0.099, {"is_beyond_max_abs"})):
            assert flags(meter(max_abs).measure(x)[0]) == expected

    @pytest.mark.parametrize("shape", [(4,), ()])
    def test_of_less_than_two_dimensions_only_magnitudes_count(self, shape: Any) -> None:
        watching = meter(max_abs=1e7)
        for scale in (1.0, 1e6, 1e-6, 0.0):
            assert flags(watching.measure(torch.full(shape, scale))[0]) == set()
        assert flags(watching.measure(torch.full(shape, 1e8))[0]) == {"is_beyond_max_abs"}

    def test_a_scale_that_jumps_either_way_and_the_sample_that_does(self) -> None:
        watching = meter(ratio=100.0)
        for _ in range(3):
            assert flags(watching.measure(torch.randn(8, 3, 50))[0]) == set()
        for scale, expected in ((30.0, set()), (1 / 30, set()), (1e3, {"is_drifted"}), (1e-3, {"is_drifted"})):
            assert flags(watching.measure(torch.randn(8, 3, 50) * scale)[0]) == expected
        x = torch.randn(8, 3, 50)
        x[5] *= 1e4
        [stats] = watching.measure(x)
        assert flags(stats) == {"is_drifted"}
        far = stats.samples[:, 2] > 100 * said(stats)["usual_std"]
        assert far.tolist() == [place == 5 for place in range(8)], "one outlier does not make the others look like some"

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.sampled_from([1e-4, 1e-2, 1.0, 3.0, 1e2, 1e4, math.nan, 0.0]), min_size=1, max_size=25))
    def test_the_usual_scale_is_the_geometric_mean_of_the_batches_that_were_not_flagged(self, scales: Any) -> None:
        watching, usual, row = meter(ratio=10.0), [], 0
        x = torch.randn(4, 2, 30)
        for scale in scales:
            values = x * scale if scale else torch.zeros_like(x)
            [stats] = watching.measure(values)
            std = float(values.double().std(correction=0)) if math.isfinite(scale) else 0.0
            mean = math.exp(sum(map(math.log, usual)) / len(usual)) if usual else None
            drifted = mean is not None and std > 0 and abs(math.log(std / mean)) > math.log(10.0)
            assert ("is_drifted" in flags(stats)) == drifted
            assert said(stats)["usual_std"] == pytest.approx(mean or math.nan, rel=1e-5, nan_ok=True)
            row += drifted
            if row >= (ADOPTED if len(usual) > 1 else ADOPTED // 2):
                usual, row = [std], 0
            elif std > 0 and not flags(stats):
                usual, row = [*usual, std], 0

    def test_an_outlier_in_the_first_batch_does_not_condemn_the_rest_of_the_run(self) -> None:
        watching = meter()
        watching.measure(torch.randn(4, 3, 50) * 1e5)
        flagged = [bool(flags(watching.measure(torch.randn(4, 3, 50))[0])) for _ in range(20)]
        assert flagged == [True] * 4 + [False] * 16

    def test_what_is_beyond_the_limit_never_is_the_usual(self) -> None:
        watching = meter(max_abs=100.0)
        watching.measure(torch.randn(4, 3, 50))
        for _ in range(20):
            watching.measure(torch.randn(4, 3, 50) * 1e5)
        assert flags(watching.measure(torch.randn(4, 3, 50))[0]) == set()

    def test_two_bad_batches_beside_each_other_are_not_the_usual_even_behind_the_first(self) -> None:
        watching = meter()
        scales = [1.0, 1e5, 1e5, 1.0, 1.0, 1e5, 1.0]
        found = [bool(flags(watching.measure(torch.randn(4, 3, 50) * scale)[0])) for scale in scales]
        assert found == [scale > 1 for scale in scales]


class TestConstantChannels:
    def test_each_is_flagged_once_if_it_varied_before(self) -> None:
        watching = meter()
        dead = torch.randn(4, 3, 50)
        dead[:, 1] = 0.25
        assert flags(watching.measure(torch.randn(4, 3, 50))[0]) == set()
        [stats] = watching.measure(dead)
        assert flags(stats) == {"is_constant"}
        assert (said(stats)["constant_channels"], said(stats)["first_constant_channel"]) == (1, 1)
        assert flags(watching.measure(dead)[0]) == set()
        dead[:, 2] = 7.0
        assert said(watching.measure(dead)[0])["first_constant_channel"] == 2

    def test_one_that_is_so_from_the_first_batch_is_meant_to_be(self) -> None:
        watching = meter()
        dead = torch.randn(4, 3, 50)
        dead[:, 1] = 0.0
        [stats] = watching.measure(dead)
        assert flags(stats) == set()
        assert stats.constant is not None
        assert stats.constant.tolist() == [0, 1, 0]
        [stats] = watching.measure(dead)
        assert (flags(stats), stats.constant) == (set(), None)

    def test_constant_in_each_sample_but_not_over_the_batch_is_not_constant(self) -> None:
        watching = meter()
        watching.measure(torch.randn(4, 3, 50))
        assert flags(watching.measure(torch.randn(4, 3, 1).expand(4, 3, 50))[0]) == set()

    @pytest.mark.parametrize(("shape", "expected"), [((6, 3, 1), {"is_constant"}), ((6, 3), set())])
    def test_only_tensors_with_three_dimensions_or_more_have_channels(self, shape: Any, expected: set[str]) -> None:
        watching = meter()
        watching.measure(torch.randn(shape))
        x = torch.randn(shape)
        x[:, 0] = 1.0
        assert flags(watching.measure(x)[0]) == expected

    def test_a_single_value_is_not_constant(self) -> None:
        watching = meter()
        for _ in range(3):
            assert flags(watching.measure(torch.randn(1, 3))[0]) == set()

    def test_a_dimension_whose_size_changes_numbers_no_channels(self) -> None:
        watching = meter()
        watching.measure(torch.randn(4, 9, 2))
        watching.measure(torch.randn(4, 7, 2))
        padded = torch.randn(4, 9, 2)
        padded[:, -1] = 0.0
        assert flags(watching.measure(padded)[0]) == set()

    def test_a_value_that_is_not_finite_is_not_constant(self) -> None:
        watching = meter()
        watching.measure(torch.randn(4, 3, 50))
        assert flags(watching.measure(torch.full((4, 3, 50), math.nan))[0]) == {"is_nonfinite"}


def test_what_is_remembered_resumes() -> None:
    batches = [torch.randn(4, 3, 10) * scale for scale in (1, 2, 1e4, 3)]
    batches.append(batches[0].clone())
    batches[-1][:, 2] = 1.0
    whole, first, second = meter(), meter(), meter()
    expected = [flags(whole.measure(batch)[0]) for batch in batches]
    for batch in batches[:2]:
        first.measure(batch)
    second.load_state_dict(first.state_dict())
    assert [flags(second.measure(batch)[0]) for batch in batches[2:]] == expected[2:]
    assert expected[2:] == [{"is_drifted"}, set(), {"is_constant"}]


def test_where_torch_must_not_look_on_the_host_it_gives_the_same() -> None:
    """The pass for devices without the kernels, on the CPU: as if each tensor held something that is not finite."""
    x = torch.randn(5, 3, 40) * 7 + 2
    bad = torch.cat([x, torch.full((1, 3, 40), math.nan)])
    [plain], [masked] = meter().measure(x), meter().measure(bad)
    torch.testing.assert_close(plain.row[:3], masked.row[:3], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(plain.samples, masked.samples[:5], rtol=1e-5, atol=0.0)


def test_the_rules_use_only_operations_that_torch_and_triton_share() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(input_rules.judge)))
    used = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert used == {"ops.abs", "ops.exp", "ops.log", "ops.where", "float"}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert names - set(input_rules.judge.__code__.co_varnames) == {"ADOPTED", "float", "ops"}


def test_the_plan_covers_every_value_once() -> None:
    for samples, channels, positions in [(1, 1, 1), (32, 19, 2048), (7, 3, 50176), (4096, 1000, 1), (16, 1024, 768)]:
        plan = input_scan._plan(samples, channels, positions)
        assert plan.groups * plan.samples >= samples > (plan.groups - 1) * plan.samples
        assert plan.judges * plan.judged >= samples
        assert plan.padded >= plan.programs <= plan.items  # each has one
        seen = np.zeros((channels, positions), dtype=int)
        for program in range(plan.programs):
            for item in range(program, plan.items, plan.programs):
                group, piece = divmod(item, plan.pieces)
                rows = slice(group * plan.channels, (group + 1) * plan.channels)
                start = piece * plan.of_piece * plan.positions
                assert start < positions
                seen[rows, start : start + plan.of_piece * plan.positions] += 1
        assert (seen == 1).all()
