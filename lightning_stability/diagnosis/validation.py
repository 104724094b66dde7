"""What of a validation step is looked at: what it returns, what it logs, and the states of the module's metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_stability.health.values import named_tensors


def spoilt_outputs(output: Any) -> list[tuple[str, Tensor]]:
    """The tensors that `validation_step` returned which are not finite; masks are made of -inf."""
    floats = [(name, tensor) for name, tensor in named_tensors(output, "output") if tensor.is_floating_point()]
    return [(name, tensor) for name, tensor in floats if bool(is_spoilt(tensor))]


def is_spoilt(tensor: Tensor) -> Tensor:
    """Whether a tensor holds NaN or +inf, or is -inf itself: 0-dimensional, on its device."""
    if not tensor.dim():
        return torch.isfinite(tensor).logical_not()
    return torch.isnan(tensor).logical_or_(torch.isposinf(tensor)).any()


def reset_metrics(module: nn.Module) -> None:
    """Empty all metrics of a module: they were recorded after the batch, and no output depends on them."""
    for part in module.modules():
        if isinstance(part, Metric):
            part.reset()


def metric_states(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The states of all metrics of a module, by name; of a list, its elements."""
    metrics = [(path, part) for path, part in module.named_modules() if isinstance(part, Metric)]
    return [entry for path, metric in metrics for entry in named_tensors(metric.metric_state, path)]
