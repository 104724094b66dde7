"""Giving back what a bad forward pass wrote: buffers, the weights it renormalises, metric states."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

LIST_READS = 256
"""Batches whose list-valued metric states may wait for their verdict before one read of the device settles all."""


class BufferUndo:
    """Keeps what the forward pass writes into the module and gives it back where the pass was bad.

    That is every buffer (running statistics, integer counters, whatever else) and every parameter that is written
    outside the optimizer: weights with a `max_norm`, and those whose version counter moved during an earlier
    forward pass. On a device the choice between old and new is made there, without a host read; on the CPU, where
    a look is free, a good batch costs one copy.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._slots: list[tuple[dict[str, Tensor | None], str, str]] = []
        self._layouts: list[_Layout] = []
        self._kept: list[Tensor] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._found: set[int] = {id(p) for m in module.modules() if _max_norm(m) for p in m.parameters(recurse=False)}
        self.rescan()

    def rescan(self) -> None:
        """Look again for what has to be kept; modules may have been added or replaced."""
        self._slots, seen = [], set()
        for prefix, owner in self._module.named_modules():
            if isinstance(owner, Metric):
                continue
            buffers = [(owner._buffers, name) for name in owner._buffers]
            written = [(owner._parameters, n) for n, p in owner._parameters.items() if id(p) in self._found]
            for tensors, name in (*buffers, *written):
                tensor = tensors[name]
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    self._slots.append((tensors, name, f"{prefix}.{name}" if prefix else name))  # type: ignore[arg-type]
        self._layouts = []
        self._kept = []

    @torch.no_grad()
    def remember(self) -> None:
        """Keep everything as it is now, before a forward pass."""
        current = self._current()
        if not self._fits(current):
            self._layouts = _lay_out(current, [name for *_, name in self._slots])
        self._kept = current
        for layout in self._layouts:
            torch._foreach_copy_(layout.old_views, layout.pick(current))  # type: ignore[arg-type]

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
        """Whether the forward pass made something non-finite that was not so before, and where.

        Returns:
            Two 0-dimensional tensors, a flag and an index into `name_at`; None if nothing of the kind is kept.
        """
        current = self._current()
        if not self._fits(current):
            return None
        found: tuple[Tensor, Tensor] | None = None
        start = 0
        for layout in self._layouts:
            if layout.floating:
                torch.cat([t.reshape(-1) for t in layout.pick(current)], out=layout.new)
                # what was non-finite before, a causal mask's -inf, is so by design
                bad = torch.isfinite(layout.new).logical_not_().logical_and_(torch.isfinite(layout.old))
                # (`bad[index]` would read the index on the host)
                here = (bad.any(), bad.to(torch.uint8).argmax() + start)
                found = here if found is None else _either(found, here)
            start += layout.old.numel()
        return found

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
        return "a buffer"

    @torch.no_grad()
    def give_back(self, bad: Tensor) -> None:
        """Put everything back as remembered if the flag says so.

        Args:
            bad: 0-dimensional, bool.
        """
        on_host = _is_on_host(bad)
        if not self._slots or (on_host and not bad):
            return
        current = self._current()
        if not self._fits(current):  # a buffer of another shape: only the host can undo that
            if bad:
                self._put_back_tensors()
            return
        for layout in self._layouts:
            mine = [tensor.detach() for tensor in layout.pick(current)]
            if not on_host:
                torch.cat([t.reshape(-1) for t in mine], out=layout.new)
                torch.where(bad, layout.old, layout.new, out=layout.new)
            torch._foreach_copy_(mine, layout.old_views if on_host else layout.new_views)  # type: ignore[arg-type]

    def _put_back_tensors(self) -> None:
        for (tensors, name, _), kept in zip(self._slots, self._kept, strict=True):
            tensors[name] = kept
        for layout in self._layouts:
            torch._foreach_copy_([t.detach() for t in layout.pick(self._kept)], layout.old_views)  # type: ignore[arg-type]

    def _current(self) -> list[Tensor]:
        return [tensors[name] for tensors, name, _ in self._slots]  # type: ignore[misc]

    def _fits(self, tensors: list[Tensor]) -> bool:
        """Whether the copies have room for these tensors; the same objects as before do."""
        if len(self._kept) == len(tensors) and all(map(operator.is_, self._kept, tensors)) and self._layouts:
            return True
        if sum(len(layout.places) for layout in self._layouts) != len(tensors):
            return False
        return all(
            (tensors[place].shape, tensors[place].dtype, tensors[place].device) == (view.shape, view.dtype, view.device)
            for layout in self._layouts
            for place, view in zip(layout.places, layout.old_views, strict=True)
        )


@dataclass(slots=True)
class _Layout:
    """Tensors of one device and dtype, and two flat copies of them."""

    places: list[int]
    names: list[str]
    sizes: list[int]
    old: Tensor
    new: Tensor
    old_views: list[Tensor]
    new_views: list[Tensor]

    @property
    def floating(self) -> bool:
        return self.old.is_floating_point() or self.old.is_complex()

    def pick(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[place] for place in self.places]


def _lay_out(tensors: list[Tensor], names: list[str]) -> list[_Layout]:
    by_kind: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(place)
    layouts = []
    for (device, dtype), places in by_kind.items():
        mine = [tensors[place] for place in places]
        sizes = [tensor.numel() for tensor in mine]
        old, new = (torch.zeros(sum(sizes), dtype=dtype, device=device) for _ in range(2))
        views = [[p.view(t.shape) for p, t in zip(torch.split(flat, sizes), mine, strict=True)] for flat in (old, new)]
        layouts.append(_Layout(places, [names[p] for p in places], sizes, old, new, *views))
    return layouts


def _either(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    flags = [a[0], b[0].to(a[0].device)]
    return flags[0] | flags[1], torch.where(flags[0], a[1], b[1].to(a[1].device))


def _max_norm(module: nn.Module) -> bool:
    """Whether a layer renormalises its weights in the forward pass, as `nn.Embedding(max_norm=...)` does."""
    return getattr(module, "max_norm", None) is not None


@dataclass(slots=True)
class _KeptMetric:
    """One metric as it was before a batch."""

    metric: Metric
    update_count: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)


class MetricUndo:
    """Keeps the states of all metrics of a module and of `self.log(..., on_epoch=True)`, and gives them back.

    Tensor states are given back on the device. List states (an AUROC's predictions) cannot be: their new elements are
    noted with the verdict and removed by `trim`, before an epoch's metrics are computed. The number of updates, which
    a mean over forward passes is weighted with, is given back where the host knows the verdict.

    Args:
        module: The LightningModule, whose `torchmetrics` states are kept.
        results: Returns the collection of what `self.log` accumulates.
    """

    def __init__(self, module: nn.Module, results: Callable[[], Any]) -> None:
        self._module = module
        self._results = results
        self._metrics: list[Metric] = []
        self._kept: list[_KeptMetric] = []
        self._undecided: list[tuple[Tensor, list[tuple[Metric, str, list[Any]]]]] = []
        self.rescan()

    def rescan(self) -> None:
        """Look again for metrics in the module."""
        self._metrics = [m for m in self._module.modules() if isinstance(m, Metric)]

    @torch.no_grad()
    def remember(self) -> None:
        """Keep every state as it is now, before a batch."""
        self._kept = [_keep(metric) for metric in self._all()]

    def give_back(self, bad: Tensor) -> None:
        """Put every state back as remembered if the flag says so.

        Args:
            bad: 0-dimensional, bool.
        """
        on_host = _is_on_host(bad)
        if on_host and not bad:
            return
        known = {id(kept.metric): kept for kept in self._kept}
        added: list[tuple[Metric, str, list[Any]]] = []
        with torch.no_grad():
            for metric in self._all():
                kept = known.get(id(metric)) or _fresh(metric)
                if metric._update_count == kept.update_count:
                    continue
                _give_back_tensors(kept, bad)
                added += _new_elements(kept)
                if on_host:
                    metric._update_count, metric._computed = kept.update_count, None
                else:  # what is settled here is not looked at again, unless it is updated once more
                    kept.update_count = metric._update_count
                    kept.lengths = {name: len(getattr(metric, name)) for name in kept.lengths}
        if added:
            self._undecided.append((bad, added))
            if on_host or len(self._undecided) >= LIST_READS:
                self.trim()

    def trim(self) -> None:
        """Remove the list elements of bad batches; reads their flags from the device."""
        undecided, self._undecided = self._undecided, []
        if not undecided:
            return
        flags = torch.stack([flag for flag, _ in undecided]).tolist()
        for bad, (_, additions) in zip(flags, undecided, strict=True):
            for metric, name, elements in additions if bad else ():
                gone = {id(element) for element in elements}
                state = getattr(metric, name)
                state[:] = [element for element in state if id(element) not in gone]
                metric._computed = None

    def _all(self) -> Iterable[Metric]:
        results = self._results()
        if results is None:
            return self._metrics
        logged = [item if item.is_tensor else item.value for item in results.values() if item.meta.on_epoch]
        elsewhere = [m for m in logged if isinstance(m, Metric) and not any(m is known for known in self._metrics)]
        return [*self._metrics, *elsewhere]


def _keep(metric: Metric) -> _KeptMetric:
    kept = _KeptMetric(metric, metric._update_count)
    for name in metric._defaults:
        state = getattr(metric, name)
        if isinstance(state, list):
            kept.lengths[name] = len(state)
        elif isinstance(state, Tensor):
            kept.tensors[name] = state.detach().clone()
    return kept


def _give_back_tensors(kept: _KeptMetric, bad: Tensor) -> None:
    for name, old in kept.tensors.items():
        state = getattr(kept.metric, name)
        if isinstance(state, Tensor) and state.shape == old.shape:
            here = bad.to(state.device, non_blocking=True)
            setattr(kept.metric, name, torch.where(here, old.to(state.device, state.dtype), state.detach()))


def _fresh(metric: Metric) -> _KeptMetric:
    """A metric that the batch itself made: it goes back to its defaults."""
    kept = _KeptMetric(metric, 0)
    for name, default in metric._defaults.items():
        if isinstance(default, list):
            kept.lengths[name] = 0
        else:
            kept.tensors[name] = default.detach().clone()
    return kept


def _new_elements(kept: _KeptMetric) -> list[tuple[Metric, str, list[Any]]]:
    states = ((name, getattr(kept.metric, name), length) for name, length in kept.lengths.items())
    return [(kept.metric, n, state[length:]) for n, state, length in states if isinstance(state, list)]


def _is_on_host(flag: Tensor) -> bool:
    """Whether the host can look at a flag without waiting for a device."""
    return flag.device.type == "cpu"
