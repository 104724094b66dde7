"""What a forward pass writes is given back bit by bit; the device's way and the host's way agree."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAUROC, BinaryPrecision, BinaryRecall

from lightning_stability.recovery import BufferUndo, MetricUndo, metric_undo, undo


@pytest.fixture(params=["host", "device"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a device nobody may look at the flag; the code for that runs on the CPU just as well."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "device":
            for module in (undo, metric_undo):
                patch.setattr(module, "is_on_host", lambda flag: False)
        yield


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
def test_bad_is_given_back_and_good_stays(values: list[float]) -> None:
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
        undo.give_back(torch.tensor(bad))
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
    undo.give_back(torch.tensor(True))
    assert torch.equal(module.plain.weight, before)


def test_a_buffer_that_has_grown_is_given_back_in_its_old_size() -> None:
    module = Holder()
    undo = BufferUndo(module)
    undo.remember()
    module.table = torch.full((5,), torch.nan)
    found = undo.nonfinite()
    assert found is not None
    assert bool(found[0])
    assert undo.name_at(int(found[1])) == "table"
    undo.give_back(torch.tensor(True))
    assert module.table.shape == (2, 2)
    assert torch.equal(module.table, torch.zeros(2, 2, dtype=torch.float16))


class Metered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric(nan_strategy="disable")
        self.several = MetricCollection([BinaryPrecision(), BinaryRecall(), BinaryAUROC()])


@pytest.mark.usefixtures("way")
@given(bad=st.lists(st.booleans(), min_size=1, max_size=8), settle_twice=st.booleans())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_metrics_are_those_of_the_good_batches(bad: list[bool], settle_twice: bool) -> None:
    torch.manual_seed(0)
    ours, reference = Metered(), Metered()
    undo = MetricUndo(ours, lambda: None)
    for is_bad in bad:
        scores, target = torch.rand(4), torch.randint(0, 2, (4,))
        undo.remember()
        for module in (ours, reference):
            if module is reference and is_bad:
                continue
            module.mean.update(torch.tensor(torch.nan if is_bad else 1.5))
            module.several.update(scores, target)
        verdict = torch.tensor(is_bad)
        undo.give_back(verdict)
        if settle_twice:
            ours.mean.update(7.0)
            if not is_bad:
                reference.mean.update(7.0)
            undo.give_back(verdict)
    undo.trim()
    if all(bad):
        assert float(ours.mean.mean_value) == 0.0
        assert not ours.several["BinaryAUROC"].preds
        return
    assert torch.equal(ours.mean.compute(), reference.mean.compute())
    for name, value in reference.several.compute().items():
        assert torch.equal(ours.several.compute()[name], value), name


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
    undo.give_back(torch.tensor(bad))
    expected = before if bad else after
    assert {name: value is None for name, value in module._buffers.items()} == {
        n: v is None for n, v in expected.items()
    }
    for name, value in expected.items():
        if value is not None and name != "sparse":
            assert torch.equal(torch.nan_to_num(module._buffers[name]), torch.nan_to_num(value)), name
            assert bool(torch.isfinite(module._buffers[name]).all()) == bool(torch.isfinite(value).all()), name
