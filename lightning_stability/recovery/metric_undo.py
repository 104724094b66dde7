"""Giving back what a bad batch wrote into metrics: torchmetrics of the module, and what `self.log` accumulates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_stability.recovery.undo import is_on_host

_BEFORE_A_BATCH = ("on_train_start", "on_train_epoch_start", "on_train_batch_start")

LIST_READS = 256
"""Batches whose list-valued metric states may wait for their verdict before one read of the device settles all."""


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
        on_host = is_on_host(bad)
        if on_host and not bad:
            return
        known = {id(kept.metric): kept for kept in self._kept}
        added: list[tuple[Metric, str, list[Any]]] = []
        with torch.no_grad():
            for metric in self._all():
                kept = known.get(id(metric)) or _fresh(metric)
                if metric._update_count <= kept.update_count:  # not updated, or reset since
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

    @torch.no_grad()
    def snapshot(self) -> list[MetricSnapshot]:
        """Every state as it is now, for `put_back`; of what is logged by the step too."""
        return [MetricSnapshot.of(metric) for metric in (*self._all(), *self._by_step_alone())]

    @torch.no_grad()
    def put_back(self, snapshots: list[MetricSnapshot]) -> None:
        """Make every state what it was, whatever has become of it since.

        Args:
            snapshots: What `snapshot` returned.
        """
        for snapshot in snapshots:
            snapshot.put_back()
        known = {id(snapshot.metric) for snapshot in snapshots}
        for metric in self._all():
            if id(metric) not in known:
                metric.reset()

    def _by_step_alone(self) -> Iterable[Metric]:
        items = (self._results() or {}).values()
        return [i for i in items if i.is_tensor and not i.meta.on_epoch and i.meta.fx not in _BEFORE_A_BATCH]

    def _all(self) -> Iterable[Metric]:
        results = self._results()
        if results is None:
            return self._metrics
        # what is logged before a batch is trained says nothing of it
        items = [i for i in results.values() if i.meta.on_epoch and i.meta.fx not in _BEFORE_A_BATCH]
        logged = [item if item.is_tensor else item.value for item in items]
        elsewhere = [m for m in logged if isinstance(m, Metric) and not any(m is known for known in self._metrics)]
        return [*self._metrics, *elsewhere]


@dataclass(slots=True)
class MetricSnapshot:
    """One metric's states, lists with their elements."""

    metric: Metric
    update_count: int
    states: dict[str, Any]
    of_step: Any
    """What it was in the newest step, which `on_step=True` logs."""

    @classmethod
    def of(cls, metric: Metric) -> MetricSnapshot:
        """The states of now.

        Args:
            metric: Of torchmetrics.
        """
        states = {name: getattr(metric, name) for name in metric._defaults}
        copies = {n: list(state) if isinstance(state, list) else state.detach().clone() for n, state in states.items()}
        return cls(metric, metric._update_count, copies, metric._forward_cache)

    def put_back(self) -> None:
        """The metric has these states."""
        for name, state in self.states.items():
            setattr(self.metric, name, state)
        self.metric._update_count, self.metric._computed = self.update_count, None
        self.metric._forward_cache = self.of_step


@dataclass(slots=True)
class _KeptMetric:
    """One metric as it was before a batch."""

    metric: Metric
    update_count: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)


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
            here = bad.to(state.device)
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
