"""Giving back what a bad forward pass wrote into the module: buffers, and the weights that it renormalises."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric


class BufferUndo:
    """Keeps what the forward pass writes into the module and gives it back where the pass was bad.

    That is every dense buffer (running statistics, integer counters, whatever else) and every parameter that is
    written outside the optimizer: weights with a `max_norm`, and those whose version counter moved during an earlier
    forward pass. On a device the choice between old and new is made there, without a host read; on the CPU, where
    a look is free, a good batch costs one copy.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._slots: list[_Slot] = []
        self._held: list[Any] = []  # what the slots hold, as it was when the copies were laid out
        self._kept: list[Tensor | None] = []
        self._layouts: list[_Layout] = []
        self._old: list[Tensor | None] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._found: set[int] = {id(p) for m in module.modules() if _max_norm(m) for p in m.parameters(recurse=False)}
        self.rescan()

    def rescan(self) -> None:
        """Look again for what has to be kept; modules may have been added or replaced."""
        self._slots = []
        for prefix, owner in self._module.named_modules():
            if isinstance(owner, Metric):
                continue
            written = [name for name, p in owner._parameters.items() if id(p) in self._found]
            # a scripted module's are no dict; it writes in place only
            buffers = dict(owner._buffers.items()) if isinstance(owner, torch.jit.ScriptModule) else owner._buffers
            places = [(buffers, name) for name in buffers]
            places += [(owner._parameters, name) for name in written]  # type: ignore[misc]
            self._slots += [_Slot(tensors, name, f"{prefix}.{name}" if prefix else name) for tensors, name in places]
        self._held, self._kept, self._layouts, self._old = [], [], [], []

    @torch.no_grad()
    def remember(self) -> None:
        """Keep everything as it is now, before a forward pass."""
        if not self._fits():
            self._lay_out()
        for layout in self._layouts:
            torch._foreach_copy_(layout.old_views, layout.data)  # type: ignore[arg-type]

    def note_versions(self) -> None:
        """Before a forward pass: note which version each parameter has."""
        self._versions = [(p, p._version) for p in self._module.parameters()]

    def find_written(self) -> None:
        """After it: parameters with another version are written by the forward pass, and kept from now on."""
        written = {id(parameter) for parameter, version in self._versions if parameter._version != version}
        self._versions = []
        if not written <= self._found:
            self._found |= written
            self.rescan()

    @torch.no_grad()
    def nonfinite(self) -> tuple[Tensor, Tensor] | None:
        """Whether the forward pass made something NaN or infinite that was not so before, and where.

        A value of -inf does not count: masks are made of it.

        Returns:
            Two 0-dimensional tensors, a flag and an index into `name_at`; None if nothing of the kind is kept.
        """
        if not self._kept:  # found or scanned just now
            return None
        if not self._fits():
            return self._nonfinite_one_by_one()
        found: tuple[Tensor, Tensor] | None = None
        start = 0
        for layout in self._layouts:
            if layout.floating:
                torch.cat(layout.flat(), out=layout.new)
                bad = _bad(layout.new).logical_and_(_bad(layout.old).logical_not_())
                # (`bad[index]` would read the index on the host)
                found = either(found, (bad.any(), bad.to(torch.uint8).argmax() + start))
            start += layout.old.numel()
        return found

    def _nonfinite_one_by_one(self) -> tuple[Tensor, Tensor] | None:
        """The same, where buffers have become others: such as one that grows."""
        found: tuple[Tensor, Tensor] | None = None
        for slot, tensor, old in zip(self._slots, self._current(), self._old, strict=True):
            if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
                flag = _bad(tensor).any()
                if old is not None:
                    flag = flag & ~_bad(old).any().to(flag.device)
                found = either(found, (flag, torch.full((), self._index_of(slot), device=flag.device)))
        return found

    def _index_of(self, slot: _Slot) -> int:
        return sum(layout.old.numel() for layout in self._layouts) + self._slots.index(slot)

    def name_at(self, index: int) -> str:
        """The buffer or parameter that an index of `nonfinite` points into.

        Args:
            index: The index.
        """
        for layout in self._layouts:
            for name, size in zip(layout.names, layout.sizes, strict=True):
                if index < size:
                    return name
                index -= size
        return self._slots[index].path if index < len(self._slots) else "a buffer"

    @torch.no_grad()
    def give_back(self, bad: Tensor) -> None:
        """Put everything back as remembered if the flag says so.

        Args:
            bad: 0-dimensional, bool.
        """
        on_host = is_on_host(bad)
        if not self._kept or (on_host and not bad):
            return
        if not self._fits():
            self._give_back_one_by_one(bad)
            return
        for layout in self._layouts:
            if not on_host:
                torch.cat(layout.flat(), out=layout.new)
                torch.where(bad, layout.old, layout.new, out=layout.new)
            torch._foreach_copy_(layout.data, layout.old_views if on_host else layout.new_views)  # type: ignore[arg-type]

    def _give_back_one_by_one(self, bad: Tensor) -> None:
        """The same, where buffers have become others: replaced, of another shape, gone, or made anew."""
        for slot, kept, old in zip(self._slots, self._kept, self._old, strict=True):
            now = slot.tensor()
            if kept is None or old is None:
                if now is not None and kept is None and bad:
                    slot.tensors[slot.name] = None  # it was made by this pass
            elif now is not None and _alike(now, old) and _is_writable(now):
                now.data.copy_(torch.where(bad.to(now.device), old, now))
            elif bad:
                slot.tensors[slot.name] = kept
                kept.data.copy_(old)

    def _current(self) -> list[Tensor | None]:
        return [slot.tensor() for slot in self._slots]

    def _fits(self) -> bool:
        """Whether the slots hold the same objects, in the same memory, as when the copies were laid out."""
        held = [slot.tensors.get(slot.name) for slot in self._slots]
        same = len(held) == len(self._held) and all(map(operator.is_, held, self._held))
        return same and all(layout.is_in_place() for layout in self._layouts)

    def _lay_out(self) -> None:
        """Make room for copies: one flat tensor for each device and dtype, with a view for each tensor."""
        self._held = [slot.tensors.get(slot.name) for slot in self._slots]
        self._kept = current = self._current()
        by_kind: dict[Any, dict[int, tuple[Tensor, str]]] = {}
        for slot, tensor in zip(self._slots, current, strict=True):
            if tensor is not None:
                by_kind.setdefault((tensor.device, tensor.dtype), {}).setdefault(id(tensor), (tensor, slot.path))
        self._layouts = [
            _Layout.of([t for t, _ in kind.values()], [n for _, n in kind.values()]) for kind in by_kind.values()
        ]
        views = {id(t): v for layout in self._layouts for t, v in zip(layout.tensors, layout.old_views, strict=True)}
        self._old = [None if tensor is None else views[id(tensor)] for tensor in current]


@dataclass(slots=True, eq=False)
class _Slot:
    """A place in a module that may hold a tensor."""

    tensors: dict[str, Any]
    name: str
    path: str

    def tensor(self) -> Tensor | None:
        """What it holds now, if that is a dense tensor with values."""
        tensor = self.tensors.get(self.name)
        if tensor is None or tensor.layout != torch.strided or is_lazy(tensor):
            return None
        return tensor  # type: ignore[no-any-return]


@dataclass(slots=True)
class _Layout:
    """Tensors of one device and dtype, and two flat copies of them."""

    tensors: list[Tensor]
    names: list[str]
    sizes: list[int]
    data: list[Tensor]
    old: Tensor
    new: Tensor
    old_views: list[Tensor]
    new_views: list[Tensor]

    @classmethod
    def of(cls, tensors: list[Tensor], names: list[str]) -> _Layout:
        sizes = [tensor.numel() for tensor in tensors]
        first = tensors[0]
        old, new = (torch.zeros(sum(sizes), dtype=first.dtype, device=first.device) for _ in range(2))
        views = [
            [piece.view(t.shape) for piece, t in zip(torch.split(flat, sizes), tensors, strict=True)]
            for flat in (old, new)
        ]
        # `.data`: a pass that is yet to run backward may hold these tensors, and must not be told of a write
        return cls(tensors, names, sizes, [tensor.data for tensor in tensors], old, new, *views)

    def flat(self) -> list[Tensor]:
        """The tensors, one-dimensional."""
        return [data.reshape(-1) for data in self.data]

    def is_in_place(self) -> bool:
        """Whether the tensors are still in that memory; `Module.to` moves all of them and keeps the objects."""
        first, last = self.tensors[0], self.tensors[-1]
        return first.data_ptr() == self.data[0].data_ptr() and last.data_ptr() == self.data[-1].data_ptr()

    @property
    def floating(self) -> bool:
        return self.old.is_floating_point() or self.old.is_complex()


def either(a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A flag that is set where one of two is, and the index of the first that is.

    Args:
        a: A flag and its index, or None for nothing.
        b: The same; may be on another device.
    """
    if a is None:
        return b
    flag, index = (tensor.to(a[0].device) for tensor in b)
    return a[0] | flag, torch.where(a[0], a[1], index)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _is_writable(tensor: Tensor) -> bool:
    """Not so if elements share their memory, as those of an expanded tensor do."""
    return all(stride or size < 2 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _bad(values: Tensor) -> Tensor:
    if values.is_complex():
        return torch.isfinite(values).logical_not_()
    return torch.isnan(values).logical_or_(torch.isposinf(values))


def _max_norm(module: nn.Module) -> bool:
    """Whether a layer renormalises its weights in the forward pass, as `nn.Embedding(max_norm=...)` does."""
    return getattr(module, "max_norm", None) is not None


def is_on_host(flag: Tensor) -> bool:
    """Whether the host can look at a flag without waiting for a device."""
    return flag.device.type == "cpu"
