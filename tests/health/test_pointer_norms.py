"""The kernels' norms against float64: on a GPU, or in Triton's interpreter (tests/__init__.py asks for it)."""

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_stability.health import GradientMeter, LateReads, pointer_norms
from lightning_stability.health.kernels import load_kernels
from lightning_stability.health.pointer_norms import CHUNK, PointerNorms

Gradients = list[torch.Tensor | None]


pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def parameters_for(gradients: Gradients, dtypes: list[torch.dtype] | None = None) -> list[torch.nn.Parameter]:
    parameters = []
    for index, gradient in enumerate(gradients):
        like = torch.zeros(7, dtype=dtypes[index] if dtypes else None) if gradient is None else gradient
        parameter = torch.nn.Parameter(torch.zeros(like.shape, dtype=like.dtype))
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def check(row: torch.Tensor | None, gradients: Gradients) -> None:
    assert row is not None
    expected = [0.0 if g is None else float(g.double().norm()) for g in gradients]
    assert row[: len(gradients)].tolist() == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert float(row[len(gradients)]) == pytest.approx(math.sqrt(math.fsum(n**2 for n in expected)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_norms_and_total_of_tensors_shorter_and_longer_than_a_chunk(dtype: torch.dtype) -> None:
    sizes = (1, 5, 4096, CHUNK, CHUNK + 1, 3 * CHUNK - 1, 0)
    gradients: Gradients = [torch.randn(size).to(dtype) for size in sizes]
    check(PointerNorms(parameters_for(gradients)).measure(), gradients)


def test_several_dtypes_side_by_side() -> None:
    gradients: Gradients = [
        torch.randn(CHUNK + 3),
        torch.randn(2, 3),
        torch.randn(9).bfloat16(),
        torch.randn(CHUNK + 3).double(),
        torch.randn(0).half(),
    ]
    check(PointerNorms(parameters_for(gradients)).measure(), gradients)


def test_more_chunks_than_are_added_up_at_a_time() -> None:
    gradients: Gradients = [torch.ones(1030 * 4).repeat_interleave(4), torch.ones(3)]
    parameters = parameters_for(gradients)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pointer_norms, "CHUNK", 16)
        patch.setattr(pointer_norms, "BLOCK", 16)
        check(PointerNorms(parameters).measure(), gradients)


def test_values_that_fp32_cannot_square() -> None:
    for value in (1e25, -1e25, 1e-30, 3e38):
        gradients: Gradients = [torch.full((5,), value), torch.ones(3)]
        check(PointerNorms(parameters_for(gradients)).measure(), gradients)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, CHUNK + 2])
def test_one_bad_element_is_seen_in_its_norm_and_in_the_total(bad: float, place: int) -> None:
    gradients = [torch.ones(4), torch.ones(CHUNK + 3)]
    gradients[1][place] = bad
    row = PointerNorms(parameters_for([*gradients])).measure()
    assert row is not None
    assert float(row[0]) == 2.0
    expected = math.nan if math.isnan(bad) else math.inf
    assert row[1:3].tolist() == pytest.approx([expected] * 2, nan_ok=True)


def test_addresses_that_change_and_gradients_that_come_and_go() -> None:
    generator = random.Random(0)
    sizes = [3, CHUNK + 5, 64, 1]
    parameters = parameters_for([torch.zeros(size) for size in sizes])
    pointers = PointerNorms(parameters)
    kept = []
    for step in range(12):
        for parameter in parameters:
            if generator.random() < 0.5:
                parameter.grad = None if generator.random() < 0.5 else torch.randn(parameter.shape)
            elif parameter.grad is not None and step % 2:
                parameter.grad.mul_(2.0)
        gradients = [parameter.grad for parameter in parameters]
        row = pointers.measure()
        check(row, gradients)
        assert row is not None
        kept.append((row, row.tolist()))
    for row, values in kept:  # what was handed out stays as it was
        assert row.tolist() == values
    for parameter in parameters:
        parameter.grad = None
    check(pointers.measure(), [None] * 4)


def test_any_dense_layout_at_any_alignment() -> None:
    memory = torch.randn(CHUNK * 2 + 1)
    gradients: Gradients = [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 7).t(),
        memory[1:].view(2, CHUNK),
    ]
    check(PointerNorms(parameters_for(gradients)).measure(), gradients)


def unfit() -> dict[str, Any]:
    return {
        "expanded": torch.ones(1).expand(6),
        "with gaps": torch.ones(12)[::2],
        "sparse": torch.ones(6).to_sparse(),
        "a subclass": torch.nn.Parameter(torch.ones(6)),
    }


@pytest.mark.parametrize("name", unfit())
def test_what_is_no_plain_row_of_numbers_is_left_to_torch(name: str) -> None:
    parameters = parameters_for([torch.ones(4), torch.ones(6)])
    pointers = PointerNorms(parameters)
    assert pointers.measure() is not None
    parameters[1].grad = unfit()[name]
    assert pointers.measure() is None
    parameters[0].grad = None
    assert pointers.measure() is None
    parameters[1].grad = torch.ones(6)
    check(pointers.measure(), [None, parameters[1].grad])


def test_a_parameter_of_another_size_or_dtype_is_never_read_as_it_was() -> None:
    for other in (torch.ones(3), torch.ones(6, dtype=torch.float64), torch.ones(6, dtype=torch.bfloat16)):
        parameters = parameters_for([torch.ones(6)])
        pointers = PointerNorms(parameters)
        assert pointers.measure() is not None
        parameters[0].grad = None
        parameters[0].data = other
        parameters[0].grad = other.clone()
        assert pointers.measure() is None


def test_kernels_that_do_not_run_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: Gradients = [torch.ones(4)]
    pointers = PointerNorms(parameters_for(gradients))
    monkeypatch.setattr(pointers, "_launch", lambda *_: 1 / 0)
    assert pointers.measure() is None
    assert pointers.refused == "ZeroDivisionError: division by zero"
    monkeypatch.undo()
    assert pointers.measure() is None


class Compiled:
    """Stands in for Triton on a GPU: the first call compiles, later ones take addresses."""

    def __init__(self, kernel: Any, takes: type[Exception] | None) -> None:
        self.kernel, self.takes, self.calls = kernel, takes, []

    def __getitem__(self, grid: Any) -> Any:
        def jitted(*args: Any, num_warps: int) -> Any:
            self.calls.append("jit")
            self.last = args
            self.kernel[grid](*args)
            return {grid: direct}

        def direct(*args: Any, stream: int) -> None:
            if self.takes is not None:
                raise self.takes("function takes exactly 3 arguments")
            self.calls.append("direct")
            # the first arguments and the riders are those of the call that compiled; the row is too, here
            assert args == tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in self.last)

        return jitted


@pytest.mark.parametrize(("takes", "expected"), [(None, ["jit", "direct", "direct"]), (TypeError, ["jit"] * 3)])
def test_a_compiled_kernel_is_called_by_itself_where_that_works(takes: Any, expected: list[str]) -> None:
    found = load_kernels("pointer_kernels")
    kernel = Compiled(found.fill_row, takes)
    launch = pointer_norms._Launch(
        kernel, 4, (torch.ones(3, dtype=torch.float64), torch.tensor([0, 3, 0, 3], dtype=torch.int32)), (16,), warps=4
    )
    row, riders = torch.zeros(4, dtype=torch.float64), (torch.tensor(-5.0), torch.tensor(7.0))
    for _ in range(3):
        launch(0, *riders, row)
    assert kernel.calls == expected
    assert row.tolist() == [3**0.5, 3**0.5, -5.0, 7.0]


def test_a_meter_hands_over_norms_and_riders_and_changes_its_way_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = parameters_for([torch.ones(4), torch.ones(9)])
    names = {parameter: str(index) for index, parameter in enumerate(parameters)}
    meter = GradientMeter(torch.optim.SGD(parameters, lr=0.1), names, drives_clipping=False)
    meter.pointers = PointerNorms(parameters)
    meter._on_host = False  # as on a GPU
    reads, seen, ways = LateReads(every=2), [], []
    changes = [torch.ones(9), None, torch.ones(9).to_sparse(), torch.full((9,), 2.0)]
    for step, gradient in enumerate(changes):
        parameters[1].grad = gradient
        scale, loss = torch.tensor(8.0 + step), torch.tensor(-1.0 * step)
        rate = torch.tensor(0.5)
        meter.measure({"learning_rate_0": rate, "loss_scale": scale}, {"loss": loss, "bad_batch": torch.tensor(3)})
        ways.append(meter.measures_by_address)
        scale.fill_(0.0)
        rate.fill_(0.0)
        total = float(meter.total_norm())
        assert total == pytest.approx(math.hypot(*meter.norms.tolist()))
        meter.put("found_inf", torch.tensor(1.0))
        meter.send(reads, lambda m: seen.append((m.grad_norms.tolist(), m.scalars)))
    reads.drain()
    assert ways == [True, True, False, True]
    assert [norms for norms, _ in seen] == [[2.0, 3.0], [2.0, 0.0], [2.0, 3.0], [2.0, 6.0]]
    for step, (_, scalars) in enumerate(seen):
        expected = {"learning_rate_0": 0.5, "loss_scale": 8.0 + step, "loss": -1.0 * step}
        assert scalars == {**expected, "bad_batch": 3.0, "found_inf": 1.0}
