"""The kernels against torch's pass: on a GPU, or in Triton's interpreter (tests/__init__.py asks for it)."""

import math
from typing import Any

import pytest
import torch

from lightning_stability.health import input_scan
from lightning_stability.health.input_rules import FIELDS
from lightning_stability.health.inputs import InputMeter, TensorStats
from tests.health.same_stats import assert_same_stats

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measured(batches: list[torch.Tensor], scan: Any, max_abs: float | None = None) -> tuple[list[TensorStats], Any]:
    meter = InputMeter(max_abs, 100.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_scan, "scan", scan)
        found = [stats for batch in batches for stats in meter.measure(batch)]
    return found, meter.state_dict()


def compare(batches: list[torch.Tensor], max_abs: float | None = None) -> list[TensorStats]:
    batches = [batch.to(DEVICE) for batch in batches]
    ours, our_state = measured(batches, input_scan.scan_with_kernels, max_abs)
    reference, state = measured(batches, input_scan.scan_with_torch, max_abs)
    for stats, expected in zip(ours, reference, strict=True):
        assert_same_stats(stats, expected)
    for name, remembered in state.items():
        torch.testing.assert_close(our_state[name]["scale"], remembered["scale"], rtol=1e-5, atol=1e-6)
        channels = our_state[name]["channels"]
        assert (channels is None) == (remembered["channels"] is None)
        assert channels is None or torch.equal(channels, remembered["channels"])
    return ours


SHAPES = [(), (5,), (1, 1), (2, 5), (3, 2100), (4, 3, 100), (2, 3, 5000), (3, 4, 7, 9), (40, 2, 3), (2, 1500, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_samples_and_memory_are_those_of_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(shape) * scale + 0.5 for scale in (1.0, 2.0, 1e30, 1e-30, 1.0)]
    batches[1].view(-1)[-1] = -math.inf
    if len(shape) > 1:
        batches[4][:, shape[1] - 1] = 3.0
    compare(batches, max_abs=1e20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    batches = [torch.randn(4, 3, 50).to(dtype), torch.full((4, 3, 50), largest, dtype=dtype)]
    batches[1][:2] = -largest
    stats = compare(batches)[1]
    assert float(stats.row[1]) == pytest.approx(largest, rel=1e-6)


def test_values_that_do_not_lie_side_by_side() -> None:
    x = torch.randn(3, 8, 5, 6)
    compare([x.to(memory_format=torch.channels_last), x[:, ::2], x[:, ::2, :, 1:]])


def test_an_outlier_in_the_first_batch_and_one_in_the_first_value() -> None:
    batches = [torch.randn(4, 3, 20) * 1e5, *(torch.randn(4, 3, 20) for _ in range(12))]
    batches[11][0, 0, 0] = 1e30
    flagged = [bool(stats.flag) for stats in compare(batches)]
    assert flagged == [False, *[True] * 4, *[False] * 6, True, False]


@pytest.mark.parametrize("shape", [(6,), (3, 2100), (4, 3, 100), (2, 3, 5000)], ids=str)
def test_masks_and_what_is_not_finite_by_design(shape: tuple[int, ...]) -> None:
    def spoilt(x: torch.Tensor, value: float) -> torch.Tensor:
        x.view(-1)[[0, 1, -1]] = value
        return x

    values = {kind: spoilt(torch.randn(shape), value) for kind, value in (("nan", math.nan), ("inf", math.inf))}
    values |= {"-inf": spoilt(torch.randn(shape), -math.inf), "mask": spoilt(torch.zeros(shape), -math.inf)}
    values |= {"both": spoilt(torch.zeros(shape), -math.inf), "none": torch.zeros(shape), "fine": torch.randn(shape)}
    values["both"].view(-1)[2] = math.nan
    values["all"] = torch.full(shape, -math.inf)
    order = ["mask", "none", "mask", "nan", "both", "fine", "-inf", "-inf", "nan", "inf", "mask", "all"]
    order += ["fine", "fine", "fine", "all", "nan", "fine"]
    row = [stats.row for stats in compare([values[kind] for kind in order])]
    assert [bool(numbers[FIELDS.index("is_mask")]) for numbers in row] == [kind == "mask" for kind in order]
    flagged = [place for place, numbers in enumerate(row) if numbers[FIELDS.index("is_nonfinite")]]
    assert flagged == [3, 4, 6, 7, 8, 15, 16]


def test_all_values_bad_and_all_the_same() -> None:
    compare([torch.randn(2, 3, 4), torch.full((2, 3, 4), math.nan), torch.zeros(2, 3, 4), torch.full((2, 3, 4), 5.0)])


@pytest.mark.parametrize(
    "how", ["a first value far from the others", "values nearly equal", "equal but for one", "squares that underflow"]
)
def test_what_float32_cannot_sum_up_is_summed_up_in_float64(how: str) -> None:
    x = torch.randn(3, 2, 3000)
    if how == "a first value far from the others":
        x[:, :, 0] = 1e6
    elif how == "values nearly equal":
        x = torch.full((3, 2, 3000), 1e-20)
        x[:, 1, ::2] *= 1 + 2**-20
    elif how == "equal but for one":
        x = torch.full((3, 2, 3000), 0.1)
        x[2, 1, 7] = 0.1001
    else:
        x *= 5e-23
    [stats], _ = measured([x.to(DEVICE)], input_scan.scan_with_kernels)
    exact = x.double() - x.double().mean()
    assert float(stats.row[1]) == pytest.approx(float(exact.square().mean().sqrt()), rel=1e-6, abs=0.0)
