"""Private names of Lightning and torch are where `internals.py` looks for them."""

from __future__ import annotations

from collections import namedtuple

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

from lightning_stability import internals
from lightning_stability.internals import Overrides
from tests import runs


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


def test_a_loaders_iterator_asks_its_sampler_by_next_index():
    from torchdata.stateful_dataloader import StatefulDataLoader

    for cls in (DataLoader, StatefulDataLoader):
        iterator = iter(cls(range(4), batch_size=2))
        assert isinstance(iterator, internals.LoaderIterator)
        assert getattr(internals.LoaderIterator, internals.NEXT_INDEX)(iterator) == [0, 1]
        assert next(internals.sampler_iterator(iterator)) == [2, 3]
        assert internals.collates_by(iterator) is default_collate
        assert internals.delivers_in_order(iterator)


# --- Modules, metrics and tensors ---


def test_leaves_have_the_paths_of_python():
    pair = namedtuple("pair", "x y")
    tree = {"b": [1, (2,)], "a": pair(3, None)}
    assert internals.leaves_with_paths(tree) == [
        ("['b'][0]", 1), ("['b'][1][0]", 2), ("['a'].x", 3), ("['a'].y", None)
    ]  # fmt: skip
    assert internals.leaves_with_paths(5) == [("", 5)]
    assert internals.map_leaves(str, tree) == {"b": ["1", ("2",)], "a": pair("3", "None")}


def test_compiled_modules_are_recognised():
    plain, called, wrapped = nn.Linear(1, 1), nn.Linear(1, 1), torch.compile(nn.Linear(1, 1))
    called.compile()
    assert [internals.compiles_its_call(module) for module in (plain, called, wrapped)] == [False, True, False]
    assert [type(internals.within_compiled(module)) for module in (plain, called, wrapped)] == [
        type(None), type(None), nn.Linear
    ]  # fmt: skip


def test_lightning_marks_a_module_that_is_compiled_as_a_whole(pl):
    module = runs.make_module(pl)
    assert not internals.compiles_its_call(module)
    unwrap = __import__(f"{pl.__name__}.utilities.compile", fromlist=["from_compiled"]).from_compiled
    assert internals.compiles_its_call(unwrap(torch.compile(module)))


def test_own_parameters_are_those_beside_the_childrens():
    net = nn.MultiheadAttention(2, 1)
    assert internals.has_own_parameters(net)
    assert not internals.has_own_parameters(nn.Sequential(nn.Linear(1, 1)))


# --- Autograd and dispatch, for diagnosis ---
