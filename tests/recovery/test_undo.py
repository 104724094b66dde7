"""What a forward pass writes is restored bit by bit; the device's way and the host's way agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_stability.recovery import BufferUndo, flat_copies, undo
from tests.recovery.test_content import strange_tensors


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.zeros(2, 2, dtype=torch.float16))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)
        self.register_buffer("nothing", None)
        self.shared = self.norm
        self.words = nn.Embedding(4, 3, max_norm=0.5)
        self.plain = nn.Linear(3, 3)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in [*module.named_buffers(), *module.named_parameters()]}


def write(module: Holder, value: float) -> None:
    module.norm.running_mean.add_(value)
    module.norm.num_batches_tracked.add_(1)
    module.table = module.table + 1  # another object
    module.words.weight.data.mul_(0.5)


@pytest.mark.usefixtures("way")
@given(values=st.lists(st.sampled_from([1.0, -0.0, torch.nan, torch.inf, -torch.inf, 3e38]), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bad_is_restored_and_good_stays(values: list[float]) -> None:
    module = Holder()
    undo = BufferUndo(module)
    for value in values:
        before = state(module)
        undo.remember()
        write(module, value)
        after = state(module)
        found = undo.nonfinite()
        assert found is not None
        bad = any((torch.isnan(t) | torch.isposinf(t)).any() for n, t in after.items() if n != "mask")
        assert bool(found[0]) == bad
        if bad:
            assert undo.name_at(int(found[1])) == "norm.running_mean"
        undo.restore(torch.tensor(bad))
        expected = before if bad else after
        now = state(module)
        assert all(torch.equal(now[name], expected[name]) for name in expected)


def test_weights_that_the_forward_pass_writes_are_found_by_their_version() -> None:
    module = Holder()
    undo = BufferUndo(module)
    undo.remember()
    undo.note_versions()
    with torch.no_grad():
        module.plain.weight.mul_(2.0)
    undo.find_written()
    undo.remember()
    before = module.plain.weight.detach().clone()
    with torch.no_grad():
        module.plain.weight.mul_(torch.nan)
    undo.nonfinite()
    undo.restore(torch.tensor(True))
    assert torch.equal(module.plain.weight, before)


def test_a_buffer_that_has_grown_is_restored_in_its_old_size() -> None:
    module = Holder()
    undo = BufferUndo(module)
    undo.remember()
    module.table = torch.full((5,), torch.nan)
    found = undo.nonfinite()
    assert found is not None
    assert bool(found[0])
    assert undo.name_at(int(found[1])) == "table"
    undo.restore(torch.tensor(True))
    assert module.table.shape == (2, 2)
    assert torch.equal(module.table, torch.zeros(2, 2, dtype=torch.float16))


BOTH_WAYS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
DTYPES += [torch.uint8, torch.int16, torch.int64, torch.bool, torch.float8_e4m3fn]
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "scalar": lambda t: t[0].clone(),
    "vector": lambda t: t,
    "transposed": lambda t: t.view(2, 3).t(),
    "every other": lambda t: t[::2],
}


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.usefixtures("way")
@given(
    kinds=st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(list(SHAPES))), min_size=1, max_size=8),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.sampled_from([1.0, torch.nan])), max_size=4),
)
@settings(max_examples=100, **BOTH_WAYS)
def test_every_kind_of_number_is_kept_bit_by_bit(
    kinds: list[tuple[torch.dtype, str]], steps: list[tuple[bool, int, float]]
) -> None:
    module = nn.Module()
    for place, (dtype, shape) in enumerate(kinds):
        values = torch.tensor([-0.0, 1.0, 2.0, 3.0, 0.5, 5.0]).to(dtype)
        module.register_buffer(f"b{place}", SHAPES[shape](values))
    undo = BufferUndo(module)
    for bad, which, value in steps:
        before = {name: bits(t) for name, t in module.named_buffers()}
        undo.remember()
        name, written = list(module.named_buffers())[which % len(kinds)]
        finite_before = written.dtype.is_floating_point or written.is_complex()
        finite_before = finite_before and bool(torch.isfinite(written.to(torch.complex128)).all())
        if value == 1.0 or written.is_floating_point() or written.is_complex():
            place = written.view(-1)[:1] if written.is_contiguous() else written[:1]
            place.fill_(value)
        after = {name: bits(t) for name, t in module.named_buffers()}
        found = undo.nonfinite()
        became = finite_before and value != 1.0 and written.dtype != torch.float8_e4m3fn
        assert bool(found is not None and found[0]) == became
        if became:
            assert undo.name_at(int(found[1])) == name
        undo.restore(torch.tensor(bad))
        assert {name: bits(t) for name, t in module.named_buffers()} == (before if bad else after)


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_steps_launches_do_not_grow_with_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undo, "is_on_host", lambda flag: False)
    counts = []
    for norms in (1, 53):
        buffers = BufferUndo(nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(norms))))
        buffers.remember()
        with CountOperations() as counted:
            buffers.remember()
            buffers.nonfinite()
            buffers.restore(torch.tensor(False))
        counts.append(counted.names)
    assert counts[0] == counts[1]
    assert len(counts[0]) <= 12


@pytest.mark.usefixtures("way")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize")
@pytest.mark.parametrize("bad", [True, False])
def test_tensors_that_cannot_be_kept_are_left_alone(bad: bool) -> None:
    module = nn.Sequential(nn.LazyLinear(2), nn.BatchNorm1d(2))
    for name, value in strange_tensors().items():
        module.register_buffer(name, value)
    buffers = BufferUndo(module)
    for _ in range(2):
        buffers.remember()
        buffers.note_versions()
        module[1].running_mean.fill_(torch.nan)
        module.of_doubles.fill_(2.0)
        buffers.find_written()
        found = buffers.nonfinite()
        assert found is not None
        buffers.restore(torch.tensor(bad))
    assert bool(module[1].running_mean.isnan().any()) != bad
    assert module.of_doubles.item() == (1.0 if bad else 2.0)
    assert {name for name, _ in module.named_buffers()} >= set(strange_tensors())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [True, False])
def test_a_lazy_batch_norm_starts_anew_after_a_bad_first_batch(bad: bool) -> None:
    module = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    buffers = BufferUndo(module)
    for batch in range(3):
        buffers.remember()
        buffers.note_versions()
        module(torch.full((2, 4), torch.nan if bad else 1.0))
        buffers.find_written()
        found = buffers.nonfinite()
        assert found is not None
        assert bool(found[0]) == bad
        buffers.restore(torch.tensor(bad))
        assert module[1].num_batches_tracked.item() == (0 if bad else batch + 1)
        assert module[1].running_mean.isfinite().all()
    assert buffers.copy_of("0.weight") is None, "the first batch made it; it is not written by every one"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "become_another",
    [
        lambda module: setattr(module[1].running_mean, "data", torch.zeros(3)),
        lambda module: setattr(module[1], "running_mean", torch.zeros(3)),
        lambda module: module.__setitem__(1, nn.BatchNorm1d(3)),
        lambda module: module.append(nn.BatchNorm1d(3)),
        lambda module: module.register_buffer("new", torch.zeros(3)),
        lambda module: module[2].register_buffer("new", torch.zeros(3)),
        lambda module: module.add_module("new", nn.BatchNorm1d(3)),
        lambda module: module.double(),
    ],
)
def test_what_is_replaced_between_two_batches_is_kept_too(become_another: Callable[[Any], Any]) -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.ReLU())
    buffers = BufferUndo(module)
    buffers.remember()
    become_another(module)
    before = {name: t.clone() for name, t in module.named_buffers()}
    buffers.remember()
    for tensor in module.buffers():
        tensor.data.add_(torch.nan if tensor.is_floating_point() else 1)
    assert buffers.nonfinite()[0]
    buffers.restore(torch.tensor(True))
    assert all(torch.equal(t, before[name]) for name, t in module.named_buffers())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [3, 5])
def test_memory_that_a_bad_pass_has_replaced_is_restored(size: int) -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    held = module[1].running_var
    buffers = BufferUndo(module)
    buffers.remember()
    held.data = torch.full((size,), torch.nan)
    found = buffers.nonfinite()
    assert found[0]
    assert buffers.name_at(int(found[1])) == "1.running_var"
    buffers.restore(torch.tensor(True))
    assert module[1].running_var is held
    assert held.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.usefixtures("way")
def test_memory_that_is_converted_after_a_bad_pass_keeps_its_new_type() -> None:
    """As PrecisionFallback converts weights and buffers that are fp16."""
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    buffers = BufferUndo(module)
    buffers.remember()
    module(torch.full((2, 3), torch.nan))
    module[0].running_var.data = module[0].running_var.data.double()
    buffers.restore(torch.tensor(True))
    assert module[0].running_var.dtype is torch.float64
    assert [float(tensor.sum()) for tensor in module.buffers()] == [0.0, 3.0, 0.0] * 2


@pytest.mark.usefixtures("way")
def test_frozen_weights_that_are_written_through_data_are_found() -> None:
    module = Holder()
    module.plain.requires_grad_(False)
    module.plain.weight.data.fill_(1.0)
    buffers = BufferUndo(module)
    buffers.remember()
    buffers.note_versions()
    module.plain.weight.data[0, 0] = 2.0
    write(module, torch.nan)
    buffers.find_written()
    buffers.restore(torch.tensor(True))
    assert module.norm.running_mean.tolist() == [0.0] * 3, "what was kept already is restored in this very batch"
    buffers.remember()
    module.plain.weight.data.mul_(torch.nan)
    assert buffers.name_at(int(buffers.nonfinite()[1])) == "plain.weight"
    buffers.restore(torch.tensor(True))
    assert module.plain.weight[0].tolist() == [2.0, 1.0, 1.0]
    assert buffers.copy_of("plain.weight") is not None
    assert buffers.copy_of("plain.bias") is None


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [True, False])
def test_buffers_that_become_others(bad: bool) -> None:
    """None at first, made None, deleted, expanded, sparse, one object in two places that becomes two."""
    module = nn.Module()
    shared = torch.zeros(2)
    for name, value in {
        "none": None,
        "gone": torch.ones(2),
        "deleted": torch.ones(3),
        "expanded": torch.zeros(2, 2),
        "sparse": torch.eye(2).to_sparse(),
        "one": shared,
        "other": shared,
    }.items():
        module.register_buffer(name, value)
    undo = BufferUndo(module)
    before = dict(module._buffers)
    undo.remember()
    module.none, module.gone, module.other = torch.full((1,), torch.nan), None, torch.full((2,), torch.nan)
    del module.deleted
    module.expanded = torch.full((1, 1), torch.nan).expand(2, 2)
    after = dict(module._buffers)
    found = undo.nonfinite()
    assert found is not None
    assert bool(found[0])
    undo.restore(torch.tensor(bad))
    expected = before if bad else after
    assert {name: value is None for name, value in module._buffers.items()} == {
        n: v is None for n, v in expected.items()
    }
    for name, value in expected.items():
        if value is not None and name != "sparse":
            assert torch.equal(torch.nan_to_num(module._buffers[name]), torch.nan_to_num(value)), name
            assert bool(torch.isfinite(module._buffers[name]).all()) == bool(torch.isfinite(value).all()), name


@pytest.mark.usefixtures("way")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`torch.jit")
def test_buffers_of_a_scripted_module_are_kept() -> None:
    module = nn.Sequential(torch.jit.script(nn.Sequential(nn.BatchNorm1d(2))))
    buffers = BufferUndo(module)
    for batch in range(3):
        buffers.remember()
        module(torch.full((2, 2), torch.nan if batch == 1 else float(batch)))
        found = buffers.nonfinite()
        assert found is not None
        assert bool(found[0]) == (batch == 1)
        buffers.restore(found[0])
    assert [float(t.sum()) for _, t in module.named_buffers()][-1] == 2.0
    assert all(t.isfinite().all() for t in module.buffers())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_gpu_with_and_without_graphs(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_copies, "CUDA_GRAPHS", graphs)
    module = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(70))).cuda().half()
    buffers = BufferUndo(module)
    kept: list[tuple[Tensor, Tensor]] = []
    for batch in range(12):
        before = state(module)
        buffers.remember()
        for tensor in module.buffers():
            tensor.add_(1)
        if batch % 3 == 2:
            module[batch].running_var[1] = torch.inf
        after = state(module)
        kept.append(buffers.nonfinite())
        buffers.restore(kept[-1][0])
        expected = before if batch % 3 == 2 else after
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state(module).items())
        if batch == 7:
            module[0].running_mean = torch.ones_like(module[0].running_mean)
    assert [bool(flag) for flag, _ in kept] == [batch % 3 == 2 for batch in range(12)]
    names = [buffers.name_at(int(index)) for flag, index in kept if flag]
    assert names[-1] == "11.running_var"
