"""Strange parts of modules, and strange batches."""

from __future__ import annotations

import collections
import dataclasses
import enum
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn

WIDTH = 6

# --- Module parts: each is called with, and returns, a tensor of (batch, WIDTH)


class Part(nn.Module):
    """Does as its function says; `calls` counts."""

    def __init__(self, act: Callable[[Any, Tensor], Tensor], **members: Any) -> None:
        super().__init__()
        self.act, self.calls = act, 0
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.act(self, x)


def tied() -> nn.Module:
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


def replaced_buffer() -> nn.Module:
    def act(self: Any, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().float().mean(0)
        return x - self.mean

    return Part(act, mean=torch.zeros(WIDTH))


def buffer_by_data() -> nn.Module:
    def act(self: Any, x: Tensor) -> Tensor:
        self.mean.data = 0.9 * self.mean.data + 0.1 * x.detach().float().mean(0)
        return x - self.mean

    return Part(act, mean=torch.zeros(WIDTH))


def uninitialised_buffer() -> nn.Module:
    def act(self: Any, x: Tensor) -> Tensor:
        if self.calls == 1:
            self.late.materialize((WIDTH,))
            self.late.zero_()
        return x + self.late

    return Part(act, late=nn.UninitializedBuffer())


def complex_weight() -> nn.Module:
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64) / WIDTH)
    return Part(lambda self, x: (x.to(torch.complex64) @ self.weight).real, weight=weight)


def late_submodule() -> nn.Module:
    def act(self: Any, x: Tensor) -> Tensor:
        if self.calls == 2:
            self.late = nn.BatchNorm1d(WIDTH)
        return self.late(x) if self.calls > 1 else x

    return Part(act)


def deleted_buffer() -> nn.Module:
    def act(self: Any, x: Tensor) -> Tensor:
        if self.calls == 3:
            del self.gone
        return x

    return Part(act, gone=torch.zeros(WIDTH))


def unfrozen() -> nn.Module:
    def act(self: Any, x: Tensor) -> Tensor:
        self.weight.requires_grad_(self.calls > 2)
        return x * self.weight

    return Part(act, weight=nn.Parameter(torch.ones(WIDTH), requires_grad=False))


def replaced_parameter() -> nn.Module:
    def act(self: Any, x: Tensor) -> Tensor:
        if self.calls == 2:
            self.weight = nn.Parameter(torch.ones(WIDTH))
        return x * self.weight

    return Part(act, weight=nn.Parameter(torch.ones(WIDTH)))


def recurrent() -> nn.Module:
    def act(self: Any, x: Tensor) -> Tensor:
        self.state = self.cell(x, None if self.state is None else self.state.detach()[: len(x)])
        return self.state

    return Part(act, cell=nn.GRUCell(WIDTH, WIDTH), state=None)


def view_of_a_weight() -> nn.Module:
    part = Part(lambda self, x: self.linear(x), linear=nn.Linear(WIDTH, WIDTH))
    part.register_buffer("view", part.linear.weight.data[:2])
    return part


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Part(lambda self, x: x + self.shift.sum().item(), shift=torch.zeros(WIDTH))


def sparse_embedding() -> nn.Module:
    words = nn.Embedding(5, WIDTH, sparse=True)
    return Part(lambda self, x: x + self.words((x[:, 0].abs() * 9).long() % 5), words=words)


def shrinking_embedding() -> nn.Module:
    words = nn.Embedding(5, WIDTH, max_norm=0.5)
    return Part(lambda self, x: x + self.words((x[:, 0].abs() * 9).long() % 5), words=words)


def holding(buffer: Callable[[], Tensor]) -> Callable[[], nn.Module]:
    """A part with a buffer that nothing uses."""
    return lambda: Part(lambda self, x: x, held=buffer())


class Opaque(Tensor):
    """A tensor that can be moved, and nothing else."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            return cls(args[0].held)
        raise NotImplementedError(f"no {func}")


class NoExtraState(nn.Module):
    """A module of which no state can be asked."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def get_extra_state(self) -> Any:
        raise RuntimeError("no state")


PARTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(WIDTH), nn.LazyBatchNorm1d()),
    "tied": tied,
    "sparse embedding": sparse_embedding,
    "shrinking embedding": shrinking_embedding,
    "replaced buffer": replaced_buffer,
    "buffer by data": buffer_by_data,
    "uninitialised buffer": uninitialised_buffer,
    "never initialised buffer": holding(nn.UninitializedBuffer),
    "scripted": lambda: torch.jit.script(nn.Linear(WIDTH, WIDTH)),
    "batch norm": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "complex": complex_weight,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "recurrent": recurrent,
    "late submodule": late_submodule,
    "deleted buffer": deleted_buffer,
    "unfrozen": unfrozen,
    "replaced parameter": replaced_parameter,
    "view of a weight": view_of_a_weight,
    "inference mode": made_in_inference_mode,
    "whole numbers": lambda: Part(lambda self, x: x, n=nn.Parameter(torch.arange(WIDTH), requires_grad=False)),
    "empty parameter": lambda: Part(lambda self, x: x, empty=nn.Parameter(torch.empty(0))),
    "scalar parameter": lambda: Part(lambda self, x: x * self.scale, scale=nn.Parameter(torch.tensor(1.0))),
    "unused parameter": lambda: Part(lambda self, x: x, unused=nn.Parameter(torch.ones(3))),
    "bf16 part": lambda: Part(lambda self, x: self.m(x.bfloat16()).float(), m=nn.Linear(WIDTH, WIDTH).bfloat16()),
    "metric": lambda: Part(
        lambda self, x: (self.mean.update(x.detach().float()), x)[1], mean=torchmetrics.MeanMetric()
    ),
    "list metric": lambda: Part(
        lambda self, x: (self.cat.update(x.detach().float()), x)[1], cat=torchmetrics.CatMetric()
    ),
    "mask": holding(lambda: torch.full((3, 3), -torch.inf).triu(1)),
    "expanded buffer": holding(lambda: torch.zeros(1).expand(4)),
    "sparse buffer": holding(lambda: torch.eye(3).to_sparse()),
    "csr buffer": holding(lambda: torch.eye(3).to_sparse_csr()),
    "quantised buffer": holding(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
    "kinds of buffers": lambda: nn.Sequential(
        *(holding(lambda kind=kind: torch.ones(2, dtype=kind))() for kind in (torch.bool, torch.uint8, torch.complex64))
    ),
    "nested buffer": holding(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "mkldnn buffer": holding(lambda: torch.ones(3, 3).to_mkldnn()),
    "opaque buffer": holding(lambda: Opaque(torch.ones(3))),
    "no extra state": NoExtraState,
    "float8 buffer": holding(lambda: torch.ones(2).to(torch.float8_e4m3fn)),
}

# --- Batches


@dataclasses.dataclass
class Record:
    """A batch with names."""

    x: Tensor
    name: str
    nothing: None = None


class Slots:
    """An object without `__dict__`."""

    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Hostile:
    """An object of which everything that might be asked raises."""

    def _raise(self, *args: Any) -> Any:
        raise RuntimeError("do not touch")

    __len__ = __bool__ = __iter__ = __eq__ = __hash__ = __getattr__ = __getitem__ = __contains__ = __repr__ = _raise


class Tagged(Tensor):
    """A subclass of Tensor."""


Pair = collections.namedtuple("Pair", "x rest")
Colour = enum.Enum("Colour", "RED GREEN")

BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "list": lambda x: [x],
    "dict": lambda x: {"x": x, "y": {"deep": [x, None]}, 3: "text"},
    "ordered": lambda x: collections.OrderedDict(x=x, y=x),
    "user dict": lambda x: [x, collections.UserDict(y=x)],
    "nested tuples": lambda x: (x, (x, [None, 1, 2.5, "s", (x, ())])),
    "dataclass": lambda x: Record(x, "a"),
    "named tuple": lambda x: Pair(x, [x]),
    "csr": lambda x: (x, x.to_sparse_csr()),
    "coo": lambda x: (x, x.to_sparse()),
    "nested tensor": lambda x: (x, torch.nested.nested_tensor([x, x[:1]])),
    "jagged": lambda x: (x, torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged)),
    "slots": Slots,
    "namespace": lambda x: types.SimpleNamespace(x=x, other=[x]),
    "hostile": lambda x: (x, Hostile()),
    "numpy": lambda x: (
        x,
        np.zeros(3),
        np.array(["a"]),
        np.array([None, x], dtype=object),
        np.datetime64("2026-01-01"),
    ),
    "kinds": lambda x: (
        x,
        *(torch.ones(2).to(k) for k in (torch.bool, torch.uint8, torch.complex64, torch.float8_e5m2)),
    ),
    "sizes": lambda x: (x, torch.tensor(1.0), torch.empty(0, 3), x.expand(2, *x.shape), x.t(), x[:, ::2]),
    "quantised": lambda x: (x, torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
    "packed": lambda x: (x, nn.utils.rnn.pack_sequence([x, x[:1]])),
    "subclass": lambda x: (x, x.as_subclass(Tagged), nn.Parameter(x), Opaque(x)),
    "with a graph": lambda x: (x, (x.clone().requires_grad_() * 2)),
    "objects": lambda x: (x, {1, 2}, frozenset("a"), b"bytes", Path("p"), Colour.RED, iter([1]), print),
    "many": lambda x: [x, [x] * 100],
    "conj": lambda x: (
        x,
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(2, dtype=torch.complex64).conj().imag,
    ),
}


def tensor_of(batch: Any) -> Tensor:
    """The batch's own tensor."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, dict):
        return batch["x"]
    return batch[0] if isinstance(batch, (list, tuple)) else batch.x
