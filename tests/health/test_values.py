"""Tensors are found and judged in whatever a batch may be."""

import dataclasses
import math
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_stability.health.values import named_tensors, nonfinite_names, nonfinite_rows, small_members, tensors_of

X = torch.arange(12.0).reshape(3, 4)
BAD = X.clone()
BAD[1, 2] = math.nan
PARTS = [BAD[0], BAD[1, :3], BAD[2]]
Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Item:
    x: Tensor
    missing: Any = None


class Moved:
    """What Lightning moves to a device by its `to`."""

    def to(self, device: Any) -> Any:
        return self


class Stored(Moved):
    def __init__(self) -> None:
        self._store, self._other, self.parent, self._x = {"x": X}, {"x": X}, self, X


class RaisesOnMissing(Moved):
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class RaisesAlways:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        (X, ["batch"]),
        ({"b": [X, (X,)], "a": Pair(X, "text")}, ["batch['b'][0]", "batch['b'][1][0]", "batch['a'].x"]),
        (OrderedDict(x=UserDict(y=X)), ["batch['x']['y']"]),
        ([Item(X)], ["batch[0].x"]),
        (Stored(), ["batch['x']", "batch['x'] (2)", "batch._x"]),
        ([RaisesOnMissing(), RaisesAlways(), X], ["batch[2]"]),
        ([nn.Linear(1, 1), None, 5, Stored], []),
    ],
)
def test_tensors_have_the_names_that_python_gives_them(batch: Any, names: list[str]) -> None:
    assert [name for name, _ in named_tensors(batch)] == names
    assert list(map(id, tensors_of(batch))) == [id(tensor) for _, tensor in named_tensors(batch)]


KINDS = {
    "strided": BAD,
    "sparse": BAD.to_sparse(),
    "CSR": BAD.to_sparse_csr(),
    "CSC": BAD.to_sparse_csc(),
    "BSR": BAD.to_sparse_bsr((1, 2)),
    "nested": torch.nested.nested_tensor(PARTS),
    "jagged": torch.nested.nested_tensor(PARTS, layout=torch.jagged),
    "complex": BAD.to(torch.complex64),
    "float8": BAD.to(torch.float8_e5m2),
}
FINE = {
    "lazy": nn.LazyLinear(2).weight,
    "integers": torch.ones(2, dtype=torch.int64),
    "meta": torch.zeros(2, device="meta"),
    "empty": torch.zeros(0),
    "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
}


def test_tensors_of_every_kind_are_judged_together() -> None:
    assert nonfinite_names({**KINDS, **FINE}.items()) == list(KINDS)


@pytest.mark.parametrize("kind", [*KINDS, *FINE])
def test_rows_and_columns_of_every_kind(kind: str) -> None:
    expected = ([], []) if kind in FINE else ([1], [] if kind in ("nested", "jagged") else [2])
    assert nonfinite_rows({**KINDS, **FINE}[kind]) == expected


@settings(deadline=None, max_examples=50)
@given(shape=st.lists(st.integers(1, 4), max_size=4), data=st.data())
def test_rows_and_columns_are_those_of_the_values(shape: list[int], data: st.DataObject) -> None:
    x = torch.zeros(shape)
    places = data.draw(st.lists(st.tuples(*(st.integers(0, size - 1) for size in shape)), max_size=3))
    for place in places:
        x[place] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    ends = [sorted({place[dim] for place in places}) if len(shape) > dim else [] for dim in (0, 1)]
    assert nonfinite_rows(x) == tuple(ends)


def test_labels_and_names_are_kept_and_large_tensors_are_not() -> None:
    label, large = torch.tensor([1, 2]), torch.zeros(5000)
    kept = small_members({"x": X, "y": Pair(label, large), "item": Item(X, ["a", object()]), "map": UserDict(z=label)})
    assert kept["x"] is None
    assert kept["y"].x is label
    assert kept["y"].y is None
    assert (kept["item"].x, kept["item"].missing) == (None, ["a", None])
    assert kept["map"] == {"z": label}
