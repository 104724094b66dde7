"""Private names of Lightning and torch are where `internals.py` looks for them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_stability import internals
from lightning_stability.internals import Overrides


class Thing:
    def act(self):
        return "own"


def test_overrides_restore_in_reverse_order():
    thing, overrides = Thing(), Overrides()
    overrides.set(thing, "act", lambda: "first")
    overrides.set(thing, "act", lambda: "second")
    assert thing.act() == "second"
    overrides.restore()
    assert thing.act() == "own"
    assert vars(thing) == {}


def test_overrides_leave_what_somebody_set_over_them():
    thing, overrides = Thing(), Overrides()
    overrides.set(thing, "act", lambda: "ours")
    thing.act = lambda: "theirs"
    overrides.restore()
    assert thing.act() == "theirs"


# --- The training loop ---


# --- Precision plugins and optimizers ---


# --- Loggers ---


# --- Checkpoints, loop progress and data loaders ---


# --- Modules, metrics and tensors ---


# --- Autograd and dispatch, for diagnosis ---


def test_the_backward_node_has_the_number_of_its_operation():
    numbers: dict[str, int] = {}

    class Numbers(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            node = internals.current_backward_node()
            if node is not None and node.name() == "LogBackward0":
                numbers["backward"] = internals.node_number(node)
            elif func is torch.ops.aten.log.default:
                numbers["forward"] = internals.newest_node_number()
            return func(*args, **(kwargs or {}))

    assert internals.current_backward_node() is None
    with Numbers():
        x = torch.ones(1, requires_grad=True)
        (torch.log(x * 1) * 1).sum().backward()
    assert numbers["forward"] == numbers["backward"]


def test_every_backward_pass_is_started_by_one_function():
    codes = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            frame = sys._getframe()
            while frame is not None:
                codes.append(frame.f_code)
                frame = frame.f_back
            return grad

    x = torch.ones(1, requires_grad=True)
    Looks.apply(x).sum().backward()
    torch.autograd.grad(Looks.apply(x).sum(), x)
    assert codes.count(internals.backward_engine_code()) == 2


def test_the_key_of_memory_is_not_used_again():
    keys, kept = set(), []
    for _ in range(50):
        tensor = torch.zeros(1000)
        kept.append(internals.StorageKey(tensor))
        assert kept[-1].key == internals.storage_key(tensor[10:].view(-1))
        keys.add(kept[-1].key)
    assert len(keys) == 50


def test_the_values_of_sparse_and_nested_tensors_share_their_memory():
    dense = torch.ones(2, 3)
    assert internals.strided_values(dense) is dense
    sparse, rows = torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()
    assert internals.strided_values(sparse).shape == internals.strided_values(rows).shape == (3,)
    assert internals.storage_key(sparse) == internals.storage_key(sparse.detach())
    nested = torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(2, 2)], layout=torch.jagged)
    assert internals.strided_values(nested).shape == (3, 2)
