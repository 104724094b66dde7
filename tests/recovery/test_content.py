"""Whatever a module holds is looked at by content, and restored where a copy exists."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_stability.recovery import BufferUndo
from lightning_stability.recovery.content import SMALL, Contents
from tests.plugin.strange import NoExtraState, Opaque

NAN, INF = math.nan, math.inf


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.average = torch.zeros(2)

    def get_extra_state(self) -> Any:
        return {"average": self.average, "count": 3}


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.center = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.register_buffer("mask", torch.tensor([0.0, -INF]))
        self.register_buffer("smallest", torch.full((2,), INF))
        self.register_buffer("table", torch.eye(2).to_sparse_csr())
        self.extra = Extra()
        self.optimizer = torch.optim.SGD(self.trained.parameters(), lr=0.1)


def contents_of(module: nn.Module) -> Contents:
    contents = Contents(module, lambda: [module.optimizer])
    contents.reference()
    return contents


def poison_weight(module: Any) -> None:
    module.trained.weight.data[0, 0] = NAN


def replace_buffer(module: Any) -> None:
    module.norm.running_var = torch.full((2,), INF)


def replace_submodule(module: Any) -> None:
    module.norm = nn.BatchNorm1d(2)
    module.norm.running_mean.fill_(NAN)


def move_buffer(module: Any) -> None:
    module.scratch.data = torch.full((3,), NAN)


def to_minus_infinity(module: Any) -> None:
    module.norm.running_mean.copy_(torch.tensor([-INF, 1.0]))


def poison_mask(module: Any) -> None:
    module.mask[0] = NAN


def poison_what_started_infinite(module: Any) -> None:
    module.smallest[0] = NAN


POISONS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "trained.weight": (poison_weight, False),
    "norm.running_var": (replace_buffer, True),
    "norm.running_mean": (replace_submodule, True),
    "norm.running_mean ": (to_minus_infinity, True),
    "center": (lambda module: module.center.data.mul_(NAN), True),
    "scratch": (move_buffer, True),
    "mask": (poison_mask, True),
    "smallest": (poison_what_started_infinite, True),
    "table": (lambda module: module.table.values().mul_(NAN), False),
    "extra._extra_state[0]": (lambda module: module.extra.average.fill_(INF), False),
}


@pytest.mark.parametrize("name", POISONS)
def test_what_became_nonfinite_is_named_and_restored(name: str) -> None:
    poison, has_copy = POISONS[name]
    module = Everything()
    contents = contents_of(module)
    before = {n: t.clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}
    assert contents.became_nonfinite() == []
    poison(module)
    expected = [name.strip()]
    assert contents.became_nonfinite() == expected
    contents.reference()
    assert contents.became_nonfinite() == expected, "a look at bad content makes it no reference"
    assert contents.restore(expected) == (expected if has_copy else [])
    if has_copy:
        assert contents.became_nonfinite() == []
        now = dict([*module.named_parameters(), *module.named_buffers()])
        assert torch.equal(now[name.strip()], before[name.strip()])


def test_masks_that_come_later_are_by_design() -> None:
    module = Everything()
    contents = contents_of(module)
    module.scratch.zero_()[0] = -INF
    module.register_buffer("positions", torch.tensor([1.0, -INF]))
    module.mask.fill_(-INF)
    assert contents.became_nonfinite() == []


def test_large_frozen_weights_are_copied_once_they_were_seen_to_change() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("encoder", "bank"):
                setattr(self, name, nn.Parameter(torch.ones(SMALL + 1), requires_grad=False))

    module = Frozen()
    contents = Contents(module)
    contents.reference()
    assert contents.written == []
    assert contents.restore(["bank"]) == []
    module.bank.data[7] = 2.0  # no version counter moves
    contents.reference()
    assert [id(t) for t in contents.written] == [id(module.bank)]
    assert contents.restore(["encoder"]) == []
    module.bank.data.fill_(NAN)
    assert contents.became_nonfinite() == ["bank"]
    assert contents.restore(["bank"]) == ["bank"]
    assert module.bank[7] == 2.0


def test_without_known_optimizers_what_may_be_trained_is_not_copied() -> None:
    module = nn.Linear(2, 2)
    contents = Contents(module)
    contents.reference()
    module.weight.data.add_(1.0)
    contents.reference()
    assert contents.written == []
    module.weight.data.fill_(NAN)
    assert contents.restore(contents.became_nonfinite()) == []


def test_the_newest_good_copy_is_taken() -> None:
    module = nn.BatchNorm1d(2)
    contents, undo = Contents(module), BufferUndo(module)
    contents.reference()
    module.running_mean.fill_(5.0)
    undo.remember()
    module.running_mean.fill_(NAN)  # in a hook, after the forward pass was judged
    assert contents.restore(contents.became_nonfinite(), undo.copy_of) == ["running_mean"]
    assert module.running_mean.tolist() == [5.0, 5.0]
    module.running_mean.fill_(NAN)
    undo.remember()
    assert contents.restore(contents.became_nonfinite(), undo.copy_of) == ["running_mean"]
    assert module.running_mean.tolist() == [0.0, 0.0]


VALUES = st.sampled_from([0.0, 1.0, -1.0, 3e38, -3e38, NAN, INF, -INF])
VECTORS = st.lists(VALUES, min_size=3, max_size=3)


@given(first=VECTORS, second=VECTORS, dtype=st.sampled_from([torch.float16, torch.float32, torch.complex64]))
@settings(deadline=None, max_examples=200)
def test_more_nonfinite_values_than_there_were_are_found(
    first: list[float], second: list[float], dtype: torch.dtype
) -> None:
    module = nn.Module()
    module.register_buffer("values", torch.tensor(first).to(dtype))
    contents = Contents(module)
    contents.reference()
    module.values = torch.tensor(second).to(dtype)

    def count(values: list[float], which: Callable[[Tensor], Tensor]) -> int:
        return int(which(torch.view_as_real(t) if (t := torch.tensor(values).to(dtype)).is_complex() else t).sum())

    looks_like_a_mask = not dtype.is_complex and 0.0 in second and set(second) <= {0.0, -INF, -3e38}
    is_mask = looks_like_a_mask and (dtype is torch.float16 or -3e38 not in second)
    minus = count(second, torch.isneginf) > 0 and count(first, torch.isneginf) == 0 and not is_mask
    if dtype.is_complex:
        real = torch.view_as_real(torch.tensor(second).to(dtype))
        minus = minus and not bool(((real == 0) | torch.isneginf(real)).all())
    expected = any(count(second, w) > count(first, w) for w in (torch.isnan, torch.isposinf)) or minus
    assert contents.became_nonfinite() == (["values"] if expected else [])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize")
def test_tensors_that_cannot_be_looked_at_are_passed_over() -> None:
    module = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d(), NoExtraState())
    for name, value in strange_tensors().items():
        module.register_buffer(name, value)
    contents = Contents(module)
    for _ in range(2):
        contents.reference()
        assert contents.became_nonfinite() == []
        assert contents.restore(["empty", "meta", "no such name"]) == []


def strange_tensors() -> dict[str, Tensor]:
    return {
        "coo": torch.eye(2).to_sparse(),
        "csr": torch.eye(2).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "empty": torch.ones(0),
        "meta": torch.ones(2, device="meta"),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "transposed": torch.ones(2, 3).t(),
        "expanded": torch.ones(1).expand(3),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "flag": torch.tensor(True),
        "of_halfs": torch.ones(3, dtype=torch.float16),
        "of_doubles": torch.ones((), dtype=torch.float64),
        "complex": torch.ones(2, dtype=torch.complex128),
        "of_bytess": torch.ones(3, dtype=torch.uint8),
        "mkldnn": torch.ones(2, 2).to_mkldnn(),
        "opaque": Opaque(torch.ones(2)),
    }
