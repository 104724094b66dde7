"""What the loss is multiplied with under a GradScaler, and who divides it out again."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def scale_tensor(precision_plugin: Any) -> Tensor | None:
    """The scale that this step's loss was multiplied with, as the device tensor that is updated in place.

    `GradScaler.get_scale()` is the public way, but it waits for the device.

    Args:
        precision_plugin: The Trainer's precision plugin.

    Returns:
        A 0-dimensional tensor; None without an enabled GradScaler or before it scaled its first loss.
    """
    scaler = getattr(precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor | None = scaler._scale
    return scale


def forgive_(precision_plugin: Any, optimizer: Optimizer, forgiven: Tensor) -> None:
    """Have GradScaler find this step's gradients finite, so that it does not halve its scale for it.

    Args:
        precision_plugin: The Trainer's precision plugin.
        optimizer: The bare torch optimizer, after `unscale_` or inside of its step.
        forgiven: 1.0 for what shall be forgiven, else 0.0; 0-dimensional, on any device.
    """
    scaler = getattr(precision_plugin, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        for found_inf in scaler._per_optimizer_states.get(id(optimizer), {}).get("found_inf_per_device", {}).values():
            found_inf.mul_(1.0 - forgiven.to(found_inf.device))


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer divides the scale out inside its step, so that gradients carry it until then.

    True for the fused ones and for any optimizer that declares the same to GradScaler.

    Args:
        optimizer: The bare torch optimizer.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
