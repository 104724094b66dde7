"""The metrics of an epoch that one number of ranks began and another one ends: each sample counts once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum

from lightning_stability import internals

State = dict[str, Any]


def merged_metrics(states: list[State], rank: int, world_size: int, module: Any) -> State:
    """What one of the new ranks continues with.

    Args:
        states: What `capture_metrics` returned on each of the old ranks.
        module: It says how the states of its metrics are reduced over ranks.
    """
    like = states[rank % len(states)]
    return {
        "connector": like["connector"],
        "results": {key: _result([s["results"].get(key) for s in states], world_size, rank) for key in like["results"]},
        "torchmetrics": _torchmetrics([state["torchmetrics"] for state in states], rank, module),
    }


def _result(logged: list[State | None], world_size: int, rank: int) -> State:
    """A value that was logged. A mean is shared out equally, so that it is right on each rank and over all."""
    known = [state for state in logged if state is not None]
    first = known[0]
    if not first["is_tensor"]:
        return {**first, "from_other_ranks": True}
    values = torch.stack([torch.as_tensor(state["value"]) for state in known])
    count = sum(state["update_count"] for state in known)
    merged = {**first, "update_count": count, "from_other_ranks": True}
    reduce_fx = first["reduce_fx"]
    if reduce_fx == "mean":
        sizes = torch.stack([torch.as_tensor(state["cumulated_batch_size"]) for state in known])
        return {**merged, "value": values.sum(0) / world_size, "cumulated_batch_size": sizes.sum(0) / world_size}
    if reduce_fx == "sum":
        return {**merged, "value": values.sum(0) if rank == 0 else torch.zeros_like(values[0])}
    return {**merged, "value": values.amax(0) if reduce_fx == "max" else values.amin(0)}


def _torchmetrics(states: list[dict[str, State]], rank: int, module: Any) -> dict[str, State]:
    metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
    merged = {}
    for name, like in states[0].items():
        if name not in metrics:
            continue
        known = [state[name] for state in states if name in state]
        reductions = internals.metric_reductions(metrics[name])
        merged[name] = {
            **like,
            "update_count": sum(state["update_count"] for state in known),
            "states": {
                key: _state([state["states"][key] for state in known], reductions.get(key), metrics[name], key, rank)
                for key in like["states"]
            },
        }
    return merged


def _state(values: list[Any], reduction: Any, metric: Metric, key: str, rank: int) -> Any:
    """Sums and lists are the first rank's alone: they are added up over ranks at the epoch's end."""
    if reduction is dim_zero_cat or isinstance(values[0], list):
        items = [item for value in values for item in (value if isinstance(value, list) else [value])]
        if isinstance(values[0], list):
            return items if rank == 0 else []
        joined = torch.cat([item.reshape(-1) if item.ndim == 0 else item for item in items])
        return joined if rank == 0 else joined[:0]
    if not isinstance(values[0], Tensor):
        return values[0]
    if reduction is dim_zero_sum:
        default: Any = internals.metric_defaults(metric)[key]
        return torch.stack(values).sum(0) if rank == 0 else default.clone()
    stacked = torch.stack(values)
    if reduction is dim_zero_mean:
        return stacked.float().mean(0).to(stacked.dtype)
    if reduction is dim_zero_max:
        return stacked.amax(0)
    return stacked.amin(0) if reduction is dim_zero_min else values[rank % len(values)]
