"""Restoring what a bad forward pass wrote into the module: buffers, and the weights that it renormalises."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_stability.internals import buffers_of, children_of, parameters_of, version_of
from lightning_stability.recovery.flat_copies import FlatCopies, Found, word_of
from lightning_stability.recovery.flat_copies import either as either
from lightning_stability.recovery.tensors import CHECKED, dense, is_writable, sizes_of, values_of


class BufferUndo:
    """Keeps what the forward pass writes into the module and restores it where the pass was bad.

    That is every dense buffer (running statistics, integer counters, whatever else) and every parameter that is
    written outside the optimizer: weights with a `max_norm`, and those that an earlier forward pass was seen to write,
    through `.data` too. On a device the choice between old and new is made there, without a host read; on the CPU,
    where a read is free, a good batch costs two copies.

    No method needs `no_grad`, whose decorator takes longer than some of them: `tensors.dense` gives detached memory.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._found: set[int] = set()  # parameters that are written outside the optimizer
        self._watched: list[_Watched] = []
        self._stale = True
        self._slots: list[_Slot] = []
        self._held: list[Any] = []  # what the slots hold, as it was when the copies were laid out
        self._old: list[Tensor | None] = []  # and the copies
        self._layouts: list[FlatCopies] = []
        self._apart: list[tuple[_Slot, Tensor, Tensor]] = []  # tensors that are not contiguous, with their copies
        self._lazy: list[Any] = []
        self._gathered = False
        self._scan()

    def rescan(self) -> None:
        """From the next `remember` on keep what the module holds then; modules may be added, or tensors of other types.

        (Modules and buffers that are added or replaced are noticed without this.)
        """
        self._stale = True

    def keep(self, parameters: Iterable[Tensor]) -> None:
        """From the next `remember` on keep these parameters too: they are written outside the optimizer."""
        new = {id(parameter) for parameter in parameters} - self._found
        if new:
            self._found |= new
            self._stale = True

    def remember(self) -> None:
        """Keep everything as it is now, before a forward pass."""
        if self._stale or self._is_another_tree():
            self._scan()
        if self._stale or not self._fits():
            self._lay_out()
        for layout in self._layouts:
            layout.remember()
        for _, memory, old in self._apart:
            old.copy_(memory)
        self._gathered = False

    def note_versions(self) -> None:
        """Before a forward pass: note what each parameter is, so that `find_written` sees which are written.

        Those that are not trained are read for it: a write through `.data` moves no version counter.
        """
        parameters = list(self._module.parameters())
        frozen = {id(p): values for p in parameters if not p.requires_grad and (values := values_of(p)) is not None}
        sizes = dict(zip(frozen, sizes_of(list(frozen.values())), strict=True))
        self._watched = [_Watched(p, version_of(p), sizes.get(id(p))) for p in parameters if not is_lazy(p)]

    def find_written(self) -> None:
        """After it: parameters that it has written are kept from the next `remember` on."""
        watched, self._watched = self._watched, []
        written = [w.parameter for w in watched if version_of(w.parameter) != w.version]
        read = [(w, values) for w in watched if w.size is not None and (values := values_of(w.parameter)) is not None]
        sizes = sizes_of([values for _, values in read])
        written += [w.parameter for (w, _), size in zip(read, sizes, strict=True) if _differ(w.size, size)]
        self.keep(written)

    def nonfinite(self) -> Found | None:
        """Whether the forward pass made something NaN or infinite that was not so before, and where.

        A value of -inf does not count: masks are made of it.

        Returns:
            Two 0-dimensional tensors, a flag and an index into `name_at`; None if nothing of the kind is kept.
        """
        found: Found | None = None
        if not self._fits():
            for slot, held, old in zip(self._slots, self._held, self._old, strict=True):
                value = slot.value()
                now = dense(value)
                kept = old is not None or value is not held or any(value is lazy for lazy in self._lazy)
                if kept and now is not None and now.dtype in CHECKED:
                    found = either(found, self._newly_bad(slot, now, old))
            return found
        start = 0
        for layout in self._layouts:
            of_layout = layout.nonfinite()
            if of_layout is not None:
                flag, index = of_layout
                found = either(found, (flag, index + start if start else index))
                start += layout.checked
        for slot, memory, old in self._apart:
            if memory.dtype in CHECKED:
                found = either(found, self._newly_bad(slot, memory, old))
        self._gathered = True
        return found

    def _newly_bad(self, slot: _Slot, now: Tensor, old: Tensor | None) -> Found:
        if old is None:
            flag = _bad(now).any()
        elif _alike(now, old):
            flag = (_bad(now) & ~_bad(old)).any()
        else:
            flag = _bad(now).any() & ~_bad(old).any().to(now.device)
        index = sum(layout.checked for layout in self._layouts) + self._slots.index(slot)
        return flag, torch.full((), index, device=flag.device)

    def name_at(self, index: int) -> str:
        """The buffer or parameter that an index of `nonfinite` points into."""
        for layout in self._layouts:
            if index < layout.checked:
                return layout.name_at(index)
            index -= layout.checked
        return self._slots[index].path if index < len(self._slots) else "a buffer"

    def copy_of(self, name: str) -> Tensor | None:
        """What was remembered of a buffer or parameter; None if it is not kept."""
        return next((old for slot, old in zip(self._slots, self._old, strict=False) if slot.path == name), None)

    def restore(self, bad: Tensor) -> None:
        """Restore what was remembered if the flag (0-dimensional, bool) says so."""
        on_host, gathered, self._gathered = is_on_host(bad), self._gathered, False
        if on_host and not bad:
            return
        if not gathered and not self._fits():
            self._restore_one_by_one(bad)
            return
        for layout in self._layouts:
            if on_host:
                layout.restore()
                continue
            if not gathered:
                layout.nonfinite()
            layout.restore_where(bad)
        for _, memory, old in self._apart:
            _write_where(bad, old, memory)

    def _restore_one_by_one(self, bad: Tensor) -> None:
        """The same, where buffers have become others: replaced, moved, of another shape, gone, or made anew."""
        restarted: set[int] = set()  # modules
        for slot, held, old in zip(self._slots, self._held, self._old, strict=True):
            value = slot.value()
            now = dense(value)
            if old is not None and now is not None and _takes(now, old, value is held):
                _write_where(bad, old.to(now.device, now.dtype), now)
            elif any(value is lazy for lazy in self._lazy):
                if not is_lazy(value) and id(slot.owner) not in restarted:
                    restarted.add(id(slot.owner))
                    _restart_statistics(slot.owner, bad)
            elif (value is not held or old is not None) and bad:
                memory = dense(held)
                if old is not None and memory is not None and _takes(memory, old, True):
                    memory.copy_(old)
                elif old is not None:
                    held.data = old.clone()
                slot.tensors[slot.name] = held

    def _fits(self) -> bool:
        """Whether the slots hold the same objects, in the same memory, as when the copies were laid out."""
        held = self._values()
        if len(held) != len(self._held) or not all(map(operator.is_, held, self._held)):
            return False
        return all(layout.is_in_place() for layout in self._layouts) and all(map(is_lazy, self._lazy))

    def _values(self) -> list[Any]:
        """What the slots hold."""
        buffers = chain.from_iterable(map(dict.values, self._buffers))
        return [*buffers, *(slot.value() for slot in self._written)]

    def _is_another_tree(self) -> bool:
        """Whether modules or buffers were added, removed or replaced since the last scan."""
        if sum(map(len, self._dicts)) != self._entries:
            return True
        return not all(map(operator.is_, chain.from_iterable(map(dict.values, self._children)), self._modules))

    def _scan(self) -> None:
        """Look for what has to be kept."""
        modules = [(prefix, m) for prefix, m in self._module.named_modules() if not isinstance(m, Metric)]
        self._found |= {id(p) for _, m in modules if _max_norm(m) for p in m.parameters(recurse=False)}
        buffers = [(prefix, m, buffers_of(m)) for prefix, m in modules]
        self._children = [children for m in self._module.modules() if (children := children_of(m))]
        self._modules = [*chain.from_iterable(map(dict.values, self._children))]
        self._dicts = [b for _, _, b in buffers] + [children_of(m) for m in self._module.modules()]
        self._entries = sum(map(len, self._dicts))
        self._buffers = [tensors for _, _, tensors in buffers if tensors]
        self._written = [
            _Slot(m, parameters_of(m), name, _path(prefix, name))
            for prefix, m in modules
            for name, parameter in parameters_of(m).items()
            if id(parameter) in self._found
        ]
        self._slots = [_Slot(m, tensors, name, _path(p, name)) for p, m, tensors in buffers for name in tensors]
        self._slots += self._written
        self._stale = True

    def _lay_out(self) -> None:
        """Make room for copies: one flat tensor for each device and word, with a view for each tensor."""
        self._held = [slot.value() for slot in self._slots]
        self._lazy = [value for value in self._held if value is not None and is_lazy(value)]
        self._apart = []
        copies: dict[int, Tensor] = {}
        kinds: dict[Any, list[tuple[Tensor, Tensor, str]]] = {}
        for slot, value in zip(self._slots, self._held, strict=True):
            memory = dense(value)
            if memory is None or id(value) in copies or not is_writable(memory):
                continue
            copies[id(value)] = memory  # for now
            if memory.is_contiguous() and not memory.is_conj() and not memory.is_neg():
                kinds.setdefault((memory.device, word_of(memory)), []).append((value, memory, slot.path))
            else:
                self._apart.append((slot, memory, memory.clone()))
                copies[id(value)] = self._apart[-1][2]
        self._layouts = [FlatCopies(*map(list, zip(*kind, strict=True))) for kind in kinds.values()]
        for layout in self._layouts:
            copies |= {id(value): old for value, old in zip(layout.tensors, layout.old, strict=True)}
        self._old = [copies.get(id(value)) for value in self._held]
        self._stale = False


@dataclass(slots=True, eq=False)
class _Slot:
    """A place in a module that may hold a tensor."""

    owner: nn.Module
    tensors: dict[str, Any]
    name: str
    path: str

    def value(self) -> Any:
        return self.tensors.get(self.name)


@dataclass(slots=True)
class _Watched:
    """A parameter before a forward pass."""

    parameter: Tensor
    version: int
    size: float | None


def _path(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _restart_statistics(owner: nn.Module, bad: Tensor) -> None:
    """The first batch of a lazy batch norm was bad: its statistics begin anew."""
    reset = getattr(owner, "reset_running_stats", None)
    if reset is None:
        return
    now = {name: value.clone() for name, value in buffers_of(owner).items() if dense(value) is not None}
    reset()
    for name, value in now.items():
        first = buffers_of(owner)[name].data
        first.copy_(torch.where(bad.to(first.device), first, value))


def _write_where(bad: Tensor, old: Tensor, memory: Tensor) -> None:
    """Write what was there before over what is there, if the flag says so."""
    memory.copy_(torch.where(bad.to(memory.device), old, memory))


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _takes(memory: Tensor, old: Tensor, is_same_object: bool) -> bool:
    """Whether a copy is written into memory; that of the same object may have been converted, as precisions do."""
    fits = memory.shape == old.shape if is_same_object else _alike(memory, old)
    return fits and is_writable(memory)


def _differ(a: float | None, b: float) -> bool:
    """Whether two sums of absolute values are of different contents; NaN is like NaN."""
    return a != b and (a == a or b == b)


def _bad(values: Tensor) -> Tensor:
    if values.is_complex():
        return torch.isfinite(values).logical_not_()
    return torch.isnan(values).logical_or_(torch.isposinf(values))


def _max_norm(module: nn.Module) -> bool:
    """Whether a layer renormalises its weights in the forward pass, as `nn.Embedding(max_norm=...)` does."""
    return getattr(module, "max_norm", None) is not None


def is_on_host(flag: Tensor) -> bool:
    """Whether the host can read a flag without waiting for a device."""
    return flag.device.type == "cpu"
