"""Restoring what a bad batch wrote into metrics: torchmetrics of the module, and what `self.log` accumulates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_stability.internals import (
    is_logged_by_epoch,
    is_logged_tensor,
    is_unlogged,
    logged_in,
    logged_keys,
    mark_unlogged,
    metric_defaults,
    newest_value,
    set_newest_value,
    set_update_count,
)
from lightning_stability.recovery.undo import is_on_host

_AS_IT_BEGINS = "on_train_batch_start"
_BEFORE_A_BATCH = ("on_train_start", "on_train_epoch_start", _AS_IT_BEGINS)

_OF_TORCH = frozenset(vars(nn.Module()))
_DEEPEST, _MOST = 3, 64
"""How deep, and in containers of how many items, metrics are looked for."""

LIST_READS = 256
"""Batches whose list-valued metric states may wait for their verdict before one read of the device settles all."""


class MetricUndo:
    """Keeps the states of all metrics of a module and of `self.log(..., on_epoch=True)`, and restores them.

    Tensor states are restored on the device. What the host must know waits with the verdict until `trim`, before an
    epoch's metrics are computed: list states (an AUROC's predictions) lose the elements of bad batches, and keys that
    only bad batches logged are left out. The number of updates, which a mean over forward passes is weighted with, is
    restored where the host knows the verdict.

    Args:
        module: The LightningModule, whose `torchmetrics` states are kept.
        results: Returns the collection of what `self.log` accumulates.
    """

    def __init__(self, module: nn.Module, results: Callable[[], Any]) -> None:
        self._module = module
        self._results = results
        self._metrics: list[Metric] = []
        self._kept: dict[int, _KeptMetric] = {}
        self._logged: dict[str, _KeptItem] = {}
        self._early: dict[int, tuple[_KeptMetric, bool]] = {}
        self._undecided: list[tuple[Tensor, list[tuple[Metric, str, list[Any]]]]] = []
        self._only_bad: dict[int, tuple[Any, list[Tensor]]] = {}
        self._left_out: list[Any] = []
        self.rescan()

    def rescan(self) -> None:
        """Look again for metrics in the module."""
        self._metrics = list(_metrics_of(self._module))

    def remember(self) -> None:
        """Keep every state as it is now, before a batch."""
        if not self._metrics and not self._results():
            self._kept, self._logged, self._early = {}, {}, {}
            return
        self._kept = {id(metric): _KeptMetric.of(metric) for metric in self._all()}
        self._logged = {key: _KeptItem(item.update_count, is_unlogged(item)) for key, item in self._items()}
        self._early = {id(item): (_KeptMetric.of(item), is_unlogged(item)) for item in self._early_items()}

    @torch.no_grad()
    def nonfinite(self) -> Tensor | None:
        """Whether this batch logged, or gave to a metric, something that is not finite.

        The judge of a batch whose backward pass was not seen: the module calls `loss.backward()` itself, or has left a
        bad batch out by itself. States that were non-finite before are left out.

        Returns:
            0-dimensional, bool; None if nothing was logged or updated.
        """
        found: Tensor | None = None
        for old, new in self._changes():
            # (a state may start from an infinite value: the largest so far starts from -inf)
            flag = (~torch.isfinite(new) & (new != old) & ~torch.isnan(old)).any()
            found = flag if found is None else found | flag.to(found.device)
        return found

    def _changes(self) -> Iterable[tuple[Tensor, Tensor]]:
        """What this batch wrote, each with what was there before."""
        for metric in self._all():
            kept = self._kept.get(id(metric)) or _KeptMetric.fresh(metric)
            if metric.update_count <= kept.update_count:
                continue
            for name, old in kept.tensors.items():
                new = getattr(metric, name)
                if isinstance(new, Tensor) and new.is_floating_point() and new.shape == old.shape:
                    yield old.to(new.device, new.dtype), new
            for _, _, elements in _new_elements(kept):
                yield from ((torch.zeros_like(e), e) for e in elements if isinstance(e, Tensor))
        for _, item in self._updated_items():
            if is_logged_tensor(item) and not is_logged_by_epoch(item):
                yield torch.zeros_like(item.value), item.value

    def restore(self, bad: Tensor) -> None:
        """Restore every state as remembered if the flag (0-dimensional, bool) says so."""
        if not self._metrics and not self._results():
            return  # nothing is logged, and the module has no metric
        on_host = is_on_host(bad)
        self._note_keys(bad)
        self._restore_early(bad)
        if on_host and not bad:
            return
        added: list[tuple[Metric, str, list[Any]]] = []
        with torch.no_grad():
            for metric in self._all():
                kept = self._kept.get(id(metric)) or _KeptMetric.fresh(metric)
                if metric.update_count <= kept.update_count:  # not updated, or reset since
                    continue
                _restore_tensors(kept, bad)
                added += _new_elements(kept)
                if on_host:
                    set_update_count(metric, kept.update_count)
                else:  # what is settled here is not looked at again, unless it is updated once more
                    kept.update_count = metric.update_count
                    kept.lengths = {name: len(getattr(metric, name)) for name in kept.lengths}
        if added:
            self._undecided.append((bad, added))
            if on_host or len(self._undecided) >= LIST_READS:
                self._trim_lists()

    def _note_keys(self, bad: Tensor) -> None:
        """Keys that were logged for the first time in this epoch, or by bad batches alone so far."""
        for key, item in self._updated_items():
            if is_logged_by_epoch(item):
                self._note_key(item, self._logged.setdefault(key, _KeptItem(0, True)).unlogged, bad)

    def _note_key(self, item: Any, was_unlogged: bool, bad: Tensor) -> None:
        if is_on_host(bad) and not bad:
            self._only_bad.pop(id(item), None)
        elif was_unlogged or id(item) in self._only_bad:
            _, flags = self._only_bad.setdefault(id(item), (item, []))
            flags.append(bad)
            if len(flags) >= LIST_READS:
                flags[:] = [torch.stack(flags).all()]

    @torch.no_grad()
    def _restore_early(self, bad: Tensor) -> None:
        """What was logged as the batch began says something of it where it is not finite, and of the run elsewhere."""
        for item in self._early_items():
            kept, was_unlogged = self._early.setdefault(id(item), (_KeptMetric.fresh(item), True))
            if is_unlogged(item) or item.update_count <= kept.update_count:
                continue
            old, new = kept.tensors["value"], item.value
            flag = bad.to(new.device) & ~torch.isfinite(new).all() & ~torch.isnan(old.to(new.device)).any()
            self._note_key(item, was_unlogged, flag)
            _restore_tensors(kept, flag)
            if is_on_host(flag) and flag:
                set_update_count(item, kept.update_count)
            else:
                kept.update_count = item.update_count

    def trim(self) -> None:
        """Remove the list elements of bad batches and leave out the keys of bad batches alone; reads their flags."""
        self._trim_lists()
        only_bad, self._only_bad = self._only_bad, {}
        if not only_bad:
            return
        verdicts = torch.stack([torch.stack(flags).all().cpu() for _, flags in only_bad.values()]).tolist()
        for all_bad, (item, _) in zip(verdicts, only_bad.values(), strict=True):
            if all_bad:
                mark_unlogged(item)
                self._left_out.append(item)

    def take_left_out(self) -> set[str]:
        """The keys that only bad batches logged, and nothing since."""
        items, self._left_out = self._left_out, []
        return {key for item in items if is_unlogged(item) for key in logged_keys(item)}

    def _trim_lists(self) -> None:
        undecided, self._undecided = self._undecided, []
        if not undecided:
            return
        flags = torch.stack([flag for flag, _ in undecided]).tolist()
        for bad, (_, additions) in zip(flags, undecided, strict=True):
            for metric, name, elements in additions if bad else ():
                gone = {id(element) for element in elements}
                state = getattr(metric, name)
                state[:] = [element for element in state if id(element) not in gone]
                set_update_count(metric, metric.update_count)

    @torch.no_grad()
    def snapshot(self) -> list[MetricSnapshot]:
        """Every state as it is now, for `restore_snapshot`; of what is logged by the step too."""
        by_step = [i for _, i in self._items() if is_logged_tensor(i) and not is_logged_by_epoch(i)]
        return [MetricSnapshot.of(metric) for metric in (*self._all(), *by_step)]

    @torch.no_grad()
    def restore_snapshot(self, snapshots: list[MetricSnapshot]) -> None:
        """Make every state what it was when `snapshot` was called, whatever has become of it since."""
        for snapshot in snapshots:
            snapshot.restore()
        known = {id(snapshot.metric) for snapshot in snapshots}
        for metric in self._all():
            if id(metric) not in known:
                metric.reset()

    def _items(self) -> list[tuple[str, Any]]:
        """What `self.log` holds, but for what is logged before a batch is trained: that says nothing of it."""
        return [(key, i) for key, i in (self._results() or {}).items() if logged_in(i) not in _BEFORE_A_BATCH]

    def _early_items(self) -> list[Any]:
        items = (self._results() or {}).values()
        return [i for i in items if logged_in(i) == _AS_IT_BEGINS and is_logged_tensor(i) and is_logged_by_epoch(i)]

    def _updated_items(self) -> list[tuple[str, Any]]:
        """Those of them that this batch has logged."""
        return [
            (key, item)
            for key, item in self._items()
            if not is_unlogged(item)
            and item.update_count > (self._logged[key].update_count if key in self._logged else 0)
        ]

    def _all(self) -> Iterable[Metric]:
        items = [item for _, item in self._items() if is_logged_by_epoch(item)]
        logged = [item if is_logged_tensor(item) else item.value for item in items]
        elsewhere = [m for m in logged if isinstance(m, Metric) and not any(m is known for known in self._metrics)]
        return [*self._metrics, *elsewhere]


@dataclass(slots=True)
class MetricSnapshot:
    """One metric's states, lists with their elements."""

    metric: Metric
    update_count: int
    states: dict[str, Any]
    newest: Any

    @classmethod
    def of(cls, metric: Metric) -> MetricSnapshot:
        """The states of now."""
        states = {name: getattr(metric, name) for name in metric_defaults(metric)}
        copies = {n: list(state) if isinstance(state, list) else state.detach().clone() for n, state in states.items()}
        return cls(metric, metric.update_count, copies, newest_value(metric))

    def restore(self) -> None:
        """The metric has these states."""
        for name, state in self.states.items():
            setattr(self.metric, name, state)
        set_update_count(self.metric, self.update_count)
        set_newest_value(self.metric, self.newest)


def _metrics_of(module: nn.Module) -> Iterable[Metric]:
    """The metrics of a module, those too that it keeps in plain lists and dicts, which makes no submodules of them."""
    found: dict[int, Metric] = {}
    for part in module.modules():
        attributes = (value for name, value in vars(part).items() if name not in _OF_TORCH)
        for metric in (part, *(metric for value in attributes for metric in _metrics_in(value, _DEEPEST))):
            if isinstance(metric, Metric):
                found[id(metric)] = metric
    return found.values()


def _metrics_in(value: Any, depth: int) -> Iterator[Any]:
    kind = type(value)  # (not `isinstance`, which asks objects of the user's for their class)
    if issubclass(kind, nn.Module):
        yield from (part for part in value.modules() if isinstance(part, Metric))
    elif depth and issubclass(kind, (list, tuple, dict)) and len(value) <= _MOST:
        for item in value.values() if issubclass(kind, dict) else value:
            yield from _metrics_in(item, depth - 1)


@dataclass(slots=True)
class _KeptItem:
    """What `self.log` had accumulated under a key before a batch."""

    update_count: int
    unlogged: bool


@dataclass(slots=True)
class _KeptMetric:
    """One metric as it was before a batch."""

    metric: Metric
    update_count: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, metric: Metric) -> _KeptMetric:
        return cls(metric, metric.update_count)._with({n: getattr(metric, n) for n in metric_defaults(metric)})

    @classmethod
    def fresh(cls, metric: Metric) -> _KeptMetric:
        """A metric that the batch itself made: before it was at its defaults."""
        return cls(metric, 0)._with(metric_defaults(metric))

    def _with(self, states: dict[str, Any]) -> _KeptMetric:
        for name, state in states.items():
            if isinstance(state, list):
                self.lengths[name] = len(state)
            elif isinstance(state, Tensor):
                self.tensors[name] = state.detach().clone()
        return self


def _restore_tensors(kept: _KeptMetric, bad: Tensor) -> None:
    for name, old in kept.tensors.items():
        state = getattr(kept.metric, name)
        if isinstance(state, Tensor) and state.shape == old.shape:
            here = bad.to(state.device)
            setattr(kept.metric, name, torch.where(here, old.to(state.device, state.dtype), state.detach()))


def _new_elements(kept: _KeptMetric) -> list[tuple[Metric, str, list[Any]]]:
    states = ((name, getattr(kept.metric, name), length) for name, length in kept.lengths.items())
    return [(kept.metric, n, state[length:]) for n, state, length in states if isinstance(state, list)]
