"""Whatever a module holds is put back to the bit, in the same objects and the same memory."""

import argparse
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.classification import BinaryAUROC

from lightning_stability.recovery.attributes import MOST_ELEMENTS, Attributes, CannotPutBack


class Notes:
    def __init__(self) -> None:
        self.lines: list[str] = ["a"]
        self.inner: Any = None


class Net(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self[0](x))


def make_module() -> Any:
    net = Net(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net.register_buffer("shared", torch.zeros(1).expand(4))
    net.register_buffer("nothing", None)
    net.notes = Notes()
    net.notes.inner = Notes()
    net.options = argparse.Namespace(rate=0.5)
    net.queue, net.names, net.pair = deque([1, 2], maxlen=3), {"a"}, ([1], {"k": [2]})
    net.aside = [nn.Linear(2, 2)]  # a module that is no child
    net.metric = BinaryAUROC()
    net.metric.update(torch.tensor([0.2, 0.8]), torch.tensor([0, 1]))
    net.legacy, net.generators = np.random.RandomState(1), [np.random.default_rng(2), random.Random(3)]
    net.plain, net.array = torch.ones(2), np.ones(2)
    net.long = list(range(MOST_ELEMENTS + 1))
    return net


def everything(net: Any) -> list[Any]:
    return [
        [t.tolist() for t in net.state_dict().values()],
        [t.data_ptr() for t in [*net.parameters(), *net.buffers()]],
        [p.grad for p in net.parameters()],
        [net.notes.lines, net.notes.inner.lines, vars(net.options), list(net.queue), net.names, net.pair],
        [p.tolist() for p in net.aside[0].parameters()],
        [len(net.metric.preds), net.metric._update_count, float(net.metric.compute())],
        [net.legacy.get_state()[1].tolist(), net.generators[0].bit_generator.state, net.generators[1].getstate()],
        [net.plain.tolist(), net.array.tolist(), len(net.long), list(vars(net))],
    ]


def change(net: Any) -> None:
    with torch.no_grad():
        net(torch.randn(8, 3))
        net[0].weight.data.mul_(2.0)
        net[0].bias = nn.Parameter(torch.ones(3))
        net[1].running_var = torch.full((3,), 7.0)
        net.nothing, net.late = torch.ones(1), nn.Linear(1, 1)
        net.aside[0].weight.add_(1.0)
        net.plain.add_(1.0)
    for parameter in net.parameters():
        parameter.grad = None
    net.notes.lines.append("b")
    net.notes.inner.lines.clear()
    net.options.rate = 0.1
    net.queue.extend([3, 4])
    net.names.add("b")
    net.pair[0].append(2)
    net.pair[1]["k"].append(3)
    net.metric.update(torch.tensor([0.9]), torch.tensor([0]))
    net.legacy.rand(), net.generators[0].random(), net.generators[1].random()
    net.array[:] = 5
    net.long.append(1)
    net.counter = 1


def test_everything_that_was_changed_is_as_it_was() -> None:
    net = make_module()
    net(torch.randn(8, 3)).sum().backward()
    before, objects = everything(net), [*net.parameters(), *net.buffers()]
    gradients = [parameter.grad for parameter in net.parameters()]
    attributes = Attributes(net)
    change(net)
    assert everything(net) != before
    attributes.put_back()
    after = everything(net)
    assert str(after) == str(before)
    assert all(a is b for a, b in zip(objects, [*net.parameters(), *net.buffers()], strict=True))
    assert all(a is p.grad for a, p in zip(gradients, net.parameters(), strict=True))


def test_no_object_of_a_library_is_taken_apart() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
            self.trainer = Notes()

    holder = Holder()
    attributes = Attributes(holder)
    holder.optimizer.param_groups[0]["lr"] = 2.0
    holder.trainer.lines.append("b")
    attributes.put_back()
    assert holder.optimizer.param_groups[0]["lr"] == 2.0
    assert holder.trainer.lines == ["a", "b"]


@pytest.mark.parametrize(
    ("attribute", "why"), [(iter([1]), "is an iterator"), (nn.LazyLinear(2), "gets its shape in the first forward")]
)
def test_what_cannot_be_put_back_is_refused_by_name(attribute: Any, why: str) -> None:
    net = nn.Sequential(nn.Linear(1, 1))
    net.further = [attribute] if not isinstance(attribute, nn.Module) else attribute
    with pytest.raises(CannotPutBack, match=rf"`Sequential\.further.*` {why}"):
        Attributes(net)


@pytest.mark.parametrize("between", [lambda inner: inner, lambda inner: [inner]], ids=["objects", "lists between"])
def test_objects_in_objects_are_put_back_or_refused_but_never_left(between: Any) -> None:
    refused = []
    for deep in range(1, 12):
        net = nn.Linear(1, 1)
        innermost = holder = Notes()
        for _ in range(deep - 1):
            outer = Notes()
            outer.inner = between(holder)
            holder = outer
        net.holder = holder  # type: ignore[assignment]
        try:
            attributes = Attributes(net)
        except CannotPutBack:
            refused.append(deep)
            continue
        innermost.lines = ["b"]
        attributes.put_back()
        assert innermost.lines == ["a"], deep
    assert refused == list(range(5 if between(0) == 0 else 4, 12))


def test_an_iterator_that_a_method_has_from_the_function_around_it_is_refused() -> None:
    weights = iter([1.0, 2.0])

    class Weighted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return next(weights) * super().forward(x)

    with pytest.raises(CannotPutBack, match=r"`Weighted\.forward` is an iterator"):
        Attributes(Weighted(1, 1))


def test_what_can_be_put_back_is_although_something_else_cannot() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.array, self.numbers = np.zeros(2), [1]

    net = Net()
    attributes = Attributes(net)
    net.numbers.append(2)
    net.array.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        attributes.put_back()
    assert net.numbers == [1]


def test_memory_that_was_given_up_is_had_again() -> None:
    net = nn.Linear(2, 2)
    before = net.weight.tolist()
    attributes = Attributes(net)
    net.weight.untyped_storage().resize_(0)
    attributes.put_back()
    assert net.weight.tolist() == before


def test_sparse_and_expanded_tensors_are_left_alone() -> None:
    net = nn.Linear(1, 1)
    net.sparse, net.expanded = torch.eye(2).to_sparse(), torch.zeros(1).expand(3)
    kept = net.sparse, net.expanded
    attributes = Attributes(net)
    net.sparse = net.expanded = None
    attributes.put_back()
    assert net.sparse is kept[0]
    assert net.expanded is kept[1]
