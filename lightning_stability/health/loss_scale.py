"""What the loss is multiplied with under a GradScaler, and who divides it out again."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_stability.internals import found_inf_tensors, loss_scale, unscales_itself

__all__ = ["clear_found_inf_", "scale_tensor", "unscales_itself"]


def scale_tensor(precision_plugin: Any) -> Tensor | None:
    """The scale that this step's loss was multiplied with, as the device tensor that is updated in place.

    None without an enabled GradScaler or before it scaled its first loss.
    """
    scaler = _enabled_scaler(precision_plugin)
    scale: Tensor | None = None if scaler is None else loss_scale(scaler)
    return scale


def clear_found_inf_(precision_plugin: Any, optimizer: Optimizer, cleared: Tensor) -> None:
    """Have GradScaler find this step's gradients finite, so that it does not halve its scale for it.

    Call it after `unscale_` or inside the optimizer's step. `cleared` is 1.0 for a step to exclude, else 0.0;
    0-dimensional, on any device.
    """
    scaler = _enabled_scaler(precision_plugin)
    if scaler is not None:
        for found_inf in found_inf_tensors(scaler, optimizer):
            found_inf.mul_(1.0 - cleared.to(found_inf.device))


def _enabled_scaler(precision_plugin: Any) -> Any:
    scaler = getattr(precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None
