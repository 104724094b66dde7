"""The numbers of an epoch under way: sums of `self.log`, `callback_metrics`, torchmetrics states.

Lightning leaves them out of its checkpoints, so that `train_loss_epoch` after a resume is the mean of what came
after it.
"""

from __future__ import annotations

import builtins
import operator
import sys
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_stability import internals

_META = (
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph"),
    *("add_dataloader_idx", "dataloader_idx", "metric_attribute"),
)


def capture_metrics(trainer: Any) -> dict[str, Any]:
    """Return the state of all metrics of this rank, between two batches of training."""
    connector = internals.logger_connector(trainer)
    return {
        "connector": {name: _plain(getattr(connector, name)) for name in internals.METRIC_STATE},
        "results": _capture_results(internals.training_results(trainer)),
        "torchmetrics": _capture_torchmetrics(trainer.lightning_module),
    }


def restore_metrics(trainer: Any, state: dict[str, Any]) -> None:
    """Put the metrics back.

    Args:
        trainer: A Trainer of either namespace, before its next batch.
        state: What `capture_metrics` returned.
    """
    device = trainer.strategy.root_device
    for name, value in state["connector"].items():
        if isinstance(value, dict):
            value = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in value.items()}
        setattr(internals.logger_connector(trainer), name, value)
    _restore_torchmetrics(trainer.lightning_module, state["torchmetrics"])
    _restore_results(trainer, state["results"], device)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _capture_results(results: Any) -> dict[str, Any]:
    captured = {}
    for key, metric in results.items():
        meta = metric.meta
        if meta.sync._group is not None:
            continue  # a process group cannot be saved: this one starts anew
        captured[key] = {
            "meta": {name: getattr(meta, name) for name in _META},
            "reduce_fx": meta.reduce_fx.__name__,
            "is_builtin": getattr(builtins, meta.reduce_fx.__name__, None) is meta.reduce_fx,
            "sync_dist": meta.sync.should,
            "rank_zero_only": meta.sync.rank_zero_only,
            "is_tensor": metric.is_tensor,
            "value": metric.value if metric.is_tensor else None,
            "cumulated_batch_size": getattr(metric, "cumulated_batch_size", None),
            "forward_cache": metric._forward_cache,
            "has_reset": metric.has_reset,
            "update_count": metric._update_count,
        }
    return captured


def _restore_results(trainer: Any, captured: dict[str, Any], device: torch.device) -> None:
    results = internals.training_results(trainer)
    library = sys.modules[type(results).__module__]  # each namespace has its own classes
    for key, state in captured.items():
        reduce_fx = getattr(builtins if state["is_builtin"] else torch, state["reduce_fx"])
        kind = _as_logged_next(library._Metadata) if state.get("from_other_ranks") else library._Metadata
        meta = kind(**state["meta"], reduce_fx=reduce_fx)
        meta.sync = library._Sync(
            _should=state["sync_dist"], fn=trainer.strategy.reduce, rank_zero_only=state["rank_zero_only"]
        )
        metric = library._ResultMetric(meta, state["is_tensor"])
        if state["is_tensor"]:
            metric.value = state["value"].to(device)
        else:
            try:
                metric.value = operator.attrgetter(meta.metric_attribute)(trainer.lightning_module)
            except AttributeError:
                continue  # the module has no such metric any more
        if state["cumulated_batch_size"] is not None:
            metric.cumulated_batch_size = state["cumulated_batch_size"].to(device)
        cache = state["forward_cache"]
        metric._forward_cache = cache.to(device) if isinstance(cache, Tensor) else cache
        metric.has_reset = state["has_reset"]
        metric._update_count = state["update_count"]
        results[key] = metric


def _as_logged_next(kind: Any) -> Any:
    """Metadata that takes how to synchronise from the next call of `self.log`: it depends on the number of ranks."""

    def is_same(self: Any, other: Any) -> bool:
        self._sync = other._sync
        return all(getattr(self, name) == getattr(other, name) for name in (*_META, "reduce_fx"))

    return type(kind.__name__, (kind,), {"__eq__": is_same, "__hash__": None})


def _capture_torchmetrics(module: Any) -> dict[str, Any]:
    for collection in module.modules():
        if isinstance(collection, MetricCollection):
            # metrics that share a state are brought up to date by this, and only by this
            collection.values(copy_state=False)
    return {
        name: {
            "update_count": metric._update_count,
            "states": {
                state: list(value) if isinstance(value := getattr(metric, state), list) else value
                for state in metric._defaults
            },
            "own": _own_numbers(metric),
        }
        for name, metric in module.named_modules()
        if isinstance(metric, Metric)
    }


def _own_numbers(metric: Metric) -> dict[str, Any]:
    """What torchmetrics' wrappers keep beside their states: the largest value so far, a position in a window."""
    if not isinstance(metric, WrapperMetric):
        return {}
    return {
        name: value
        for name, value in vars(metric).items()
        if name not in metric._defaults
        and (isinstance(value, Tensor) or (name.startswith("_") and type(value) in (int, float)))
    }


def _restore_torchmetrics(module: Any, captured: dict[str, Any]) -> None:
    metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
    for name, state in captured.items():
        metric = metrics.get(name)
        if metric is None:
            continue  # made anew when it is next needed, or gone from the module
        for key, value in state["states"].items():
            if key in metric._defaults:
                moved = [v.to(metric.device) for v in value] if isinstance(value, list) else value.to(metric.device)
                setattr(metric, key, moved)
        for key, value in state["own"].items():
            setattr(metric, key, value.to(metric.device) if isinstance(value, Tensor) else value)
        metric._update_count = state["update_count"]
        metric._computed = None
