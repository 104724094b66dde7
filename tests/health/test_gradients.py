"""The meter's arithmetic against float64, for whatever shapes, dtypes and values come."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stability.health import GradientMeter, LateReads, ParameterGroups, StepRecord
from lightning_stability.health.buckets import CPU_PIECE
from lightning_stability.health.gradients import Measurement
from lightning_stability.health.record import FP32_LARGEST_NORM


def measure(meter: GradientMeter, **scalars: float) -> Measurement:
    meter.measure({name: torch.tensor(value) for name, value in scalars.items()})
    return send(meter)


def send(meter: GradientMeter) -> Measurement:
    results: list[Measurement] = []
    reads = LateReads()
    meter.send(reads, results.append)
    reads.drain()
    return results[0]


def make(
    gradients: list[torch.Tensor | None], drives_clipping: bool = False
) -> tuple[GradientMeter, list[torch.nn.Parameter]]:
    parameters = []
    for gradient in gradients:
        like = torch.zeros(3) if gradient is None else gradient
        parameter = torch.nn.Parameter(torch.zeros(like.shape, dtype=like.dtype))
        parameter.grad = gradient
        parameters.append(parameter)
    names = {parameter: str(index) for index, parameter in enumerate(parameters)}
    return GradientMeter(torch.optim.SGD(parameters, lr=0.1), names, drives_clipping), parameters


def by_name(meter: GradientMeter, values: Any) -> list[float]:
    """In the order of the parameters, whatever order the meter keeps them in."""
    return [value for _, value in sorted(zip(map(int, meter.parameter_names), values.tolist(), strict=True))]


dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
shapes = st.lists(st.integers(0, 5), max_size=3)
magnitudes = st.floats(-30, 25)


@st.composite
def gradients(draw: Any) -> list[torch.Tensor | None]:
    result: list[torch.Tensor | None] = []
    for index in range(draw(st.integers(1, 6))):
        if draw(st.integers(0, 5)) == 0:
            result.append(None)
            continue
        dtype = draw(dtypes)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)) + index)
        scale = 1.0 if dtype.itemsize == 2 else 10.0 ** draw(magnitudes)
        values = torch.randn(draw(shapes), generator=generator, dtype=torch.float64) * scale
        result.append(values.to(dtype))
    return result


def reference(tensors: list[torch.Tensor | None]) -> list[float]:
    return [
        0.0 if t is None else math.sqrt(math.fsum((t.to(torch.complex128).abs() ** 2).flatten().tolist()))
        for t in tensors
    ]


@settings(max_examples=200, deadline=None)
@given(gradients())
def test_norms_equal_float64_ones_and_overflow_is_told(tensors: list[torch.Tensor | None]) -> None:
    meter, _ = make([t if t is None else t.clone() for t in tensors])
    measured = measure(meter)
    expected = reference(tensors)
    # Squares below fp32's smallest number vanish: what is lost is below 1e-22.
    assert by_name(meter, measured.grad_norms) == pytest.approx(expected, rel=1e-4, abs=1e-20)
    record = StepRecord(0, 0, 0, 0, 1, meter.parameter_names, measured.grad_norms)
    total = math.sqrt(math.fsum(norm**2 for norm in expected))
    assert record.total_norm == pytest.approx(total, rel=1e-4, abs=1e-20)
    if abs(total / FP32_LARGEST_NORM - 1) > 1e-3:
        assert record.gradients == ("finite" if total < FP32_LARGEST_NORM else "overflow")


@settings(max_examples=100, deadline=None)
@given(gradients(), st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.randoms())
def test_a_single_bad_element_is_seen_and_named(tensors: list[torch.Tensor | None], bad: float, random: Any) -> None:
    places = [i for i, t in enumerate(tensors) if t is not None and t.numel()]
    if not places:
        return
    place = random.choice(places)
    tensors[place].reshape(-1)[random.randrange(tensors[place].numel())] = bad
    meter, _ = make(tensors)
    measured = measure(meter)
    record = StepRecord(0, 0, 0, 0, 1, meter.parameter_names, measured.grad_norms)
    assert record.gradients == ("nan" if math.isnan(bad) else "inf")
    norms = dict(zip(meter.parameter_names, measured.grad_norms.tolist(), strict=True))
    assert [name for name, norm in norms.items() if not math.isfinite(norm)] == [str(place)]


@settings(max_examples=100, deadline=None)
@given(gradients(), st.floats(1e-3, 1e3))
def test_clips_as_torch_does(tensors: list[torch.Tensor | None], max_norm: float) -> None:
    tensors = [t if t is None or t.dtype.itemsize > 2 else t.float() for t in tensors]
    meter, ours = make([t if t is None else t.clone() for t in tensors], drives_clipping=True)
    _, theirs = make([t if t is None else t.clone() for t in tensors])
    meter.measure({})
    meter.clip_(max_norm)
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    same_dtype = len({t.dtype for t in tensors if t is not None}) == 1
    for mine, their in zip(ours, theirs, strict=True):
        if mine.grad is None:
            continue
        if same_dtype:
            assert torch.equal(mine.grad, their.grad)
        else:  # torch adds up the dtypes in an order of its own
            torch.testing.assert_close(mine.grad, their.grad, rtol=1e-5, atol=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.lists(st.text("ab.", min_size=1, max_size=8), min_size=1, max_size=8, unique=True))
def test_groups_hold_each_parameter_once(depth: int, names: list[str]) -> None:
    norms = np.arange(1.0, len(names) + 1)
    groups = ParameterGroups(tuple(names), depth)
    assert float(np.sqrt((groups.norms(norms) ** 2).sum())) == pytest.approx(float(np.sqrt((norms**2).sum())))
    assert len(set(groups.names)) == len(groups.names) <= len(names)


@pytest.mark.parametrize("size", [CPU_PIECE - 1, CPU_PIECE, CPU_PIECE + 1, 50 * CPU_PIECE + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_of_equal_values(size: int, dtype: torch.dtype) -> None:
    """The worst case for a running fp32 sum: each addend is far below the sum's last digit."""
    meter, [parameter] = make([torch.full((size,), 0.01, dtype=dtype)])
    exact = float(parameter.grad.double().norm())
    assert measure(meter).grad_norms[0] == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("ends", ["send", "discard", "force", "clip"])
def test_a_second_measurement_in_a_step_changes_nothing(ends: str) -> None:
    meter, [parameter] = make([torch.ones(4)], drives_clipping=ends == "clip")
    meter.measure({"scale": torch.tensor(8.0)})
    parameter.grad.mul_(0.5)  # clipped by somebody
    meter.measure({"scale": torch.tensor(1.0)})
    assert float(meter.total_norm()) == 2.0
    if ends == "send":
        first = send(meter)
        assert (first.grad_norms.tolist(), first.scalars) == ([2.0], {"scale": 8.0})
    elif ends == "discard":
        meter.discard()
    elif ends == "clip":
        meter.clip_(10.0)
    meter.measure({"scale": torch.tensor(1.0)}, force=ends == "force")
    then = send(meter)
    assert (then.grad_norms.tolist(), then.scalars["scale"]) == ([1.0], 1.0)


def test_scalars_travel_along_as_they_were_at_the_measurement() -> None:
    scale = torch.tensor(8.0)
    meter, _ = make([torch.ones(2)])
    meter.measure({"loss_scale": scale, "loss": torch.tensor(2.0, dtype=torch.bfloat16)})
    scale.fill_(4.0)
    meter.put("found_inf", torch.tensor(1.0))
    assert send(meter).scalars == {"loss_scale": 8.0, "loss": 2.0, "found_inf": 1.0}


def test_a_gradient_that_comes_and_goes() -> None:
    meter, parameters = make([torch.ones(4), torch.ones(9)])
    for gradient, expected in (
        (None, [2, 0]),
        (torch.ones(9), [2, 3]),
        (None, [2, 0]),
        (torch.ones(9).to_sparse(), [2, 3]),
    ):
        parameters[1].grad = gradient
        assert measure(meter).grad_norms.tolist() == expected


def test_gradients_are_let_go_of_once_they_are_sent() -> None:
    import weakref

    meter, [parameter] = make([torch.ones(4)])
    measure(meter)
    gradient = weakref.ref(parameter.grad)
    parameter.grad = None
    assert gradient() is None


def test_parameters_that_the_module_does_not_name_get_a_number() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    meter = GradientMeter(torch.optim.SGD([parameter], lr=0.1), {}, drives_clipping=False)
    assert meter.parameter_names == ("unnamed_0",)


@pytest.mark.parametrize("drives_clipping", [False, True])
def test_the_vector_of_a_steps_norms_is_there_at_once_and_changes_nothing(drives_clipping: bool) -> None:
    """What a guard decides with, on the device and before the optimizer steps."""
    meter, parameters = make([torch.ones(4), torch.ones(9)], drives_clipping)
    meter.measure({})
    vector = meter.norms
    assert vector.tolist() == [2.0, 3.0]
    assert meter.norms is vector
    assert not vector.is_inference()  # such a tensor could not be written to
    parameters[0].grad = torch.full((4,), 2.0)
    assert send(meter).grad_norms.tolist() == [2.0, 3.0]
    meter.measure({})
    assert meter.norms.tolist() == [4.0, 3.0]


def test_the_vector_of_a_sparse_and_an_absent_gradients_norms() -> None:
    meter, parameters = make([torch.ones(4), torch.ones(9), torch.ones(16)])
    parameters[0].grad, parameters[1].grad = None, torch.ones(9).to_sparse()
    meter.measure({})
    assert meter.norms.tolist() == [0.0, 3.0, 4.0]
    parameters[1].grad.zero_()  # sparse gradients are put in order on the way: they stay ordinary tensors
    assert send(meter).grad_norms.tolist() == [0.0, 3.0, 4.0]


@pytest.mark.parametrize("loss", [torch.tensor(-2.0), torch.tensor(-2.0, dtype=torch.bfloat16)])
@pytest.mark.parametrize("present", [True, False])
def test_what_travels_along_when_the_norms_drive_the_clipping(loss: torch.Tensor, present: bool) -> None:
    """On a device nothing is read at once: what is written later must not change what is on its way."""
    meter, parameters = make([torch.ones(4), torch.ones(9) if present else None, torch.ones(16)], drives_clipping=True)
    _, theirs = make([None if p.grad is None else p.grad.clone() for p in parameters])
    meter._on_host = False  # as on a GPU
    scale, results, reads = torch.tensor(8.0), [], LateReads()
    for _ in range(2):
        meter.measure({"loss_scale": scale}, {"loss": loss, "bad_batch": torch.tensor(3)})
        total = float(meter.total_norm())
        scale.add_(1.0)
        meter.clip_(1.0)
        meter.send(reads, results.append)
    meter.measure({"loss_scale": scale}, {})
    meter.send(reads, results.append)
    reads.drain()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert all(p.grad is None or torch.equal(p.grad, t.grad) for p, t in zip(parameters, theirs, strict=True))
    assert total == pytest.approx(1.0, rel=1e-5)
    first, _, last = results
    norms = [2.0, 3.0 if present else 0.0, 4.0]
    assert first.grad_norms.tolist() == norms
    coefficient = 1.0 / (math.hypot(*norms) + 1e-6)
    assert first.scalars.pop("clip_coefficient") == pytest.approx(coefficient, rel=1e-6)
    assert first.scalars == {"loss_scale": 8.0, "loss": -2.0, "bad_batch": 3.0}
    assert last.scalars == {"loss_scale": 10.0}
