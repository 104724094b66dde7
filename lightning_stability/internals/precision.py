"""Private names of precision plugins and optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PLUGIN_METHODS = (
    "convert_input",
    "pre_backward",
    "backward",
    "post_backward",
    "_clip_gradients",
    "clip_gradients",
    "clip_grad_by_norm",
    "optimizer_step",
)
"""The methods of a precision plugin through which a training step goes."""


def input_dtype(plugin: Any) -> torch.dtype | None:
    """What a precision plugin casts batches to; None where it leaves them as they are."""
    dtype: torch.dtype | None = getattr(plugin, "_desired_input_dtype", None)
    return dtype


def scaler_state(plugin: Any) -> list[torch.Tensor]:
    """Copies of GradScaler's scale and of its count of good steps, on the device; empty without one."""
    scaler = getattr(plugin, "scaler", None)
    tensors = () if scaler is None else (scaler._scale, scaler._growth_tracker)
    return [tensor.clone() for tensor in tensors if tensor is not None]


def set_scaler_state(plugin: Any, state: list[torch.Tensor]) -> None:
    """Restore what `scaler_state` has copied."""
    if state:
        plugin.scaler._scale.copy_(state[0])
        plugin.scaler._growth_tracker.copy_(state[1])


def default_store() -> Any:
    """The key-value store that the processes of a distributed run share."""
    return torch.distributed.distributed_c10d._get_default_store()


def abort_collectives() -> None:
    """Give up the collectives of NCCL that are under way in this process, and all that would come.

    A process that ends without this, while another is inside of one, does not end: Lightning destroys the process group
    at exit, which waits for the other.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        abort = getattr(torch.distributed.distributed_c10d, "_abort_process_group", None)  # (private: it may go)
        if abort is not None:
            abort()


def loss_scale(scaler: Any) -> Any:
    """GradScaler's scale as the device tensor that it updates in place; None before it scaled its first loss.

    `GradScaler.get_scale()` is the public way, but it waits for the device.
    """
    return scaler._scale


def found_inf_tensors(scaler: Any, optimizer: Any) -> list[Any]:
    """What `GradScaler.unscale_` found in this optimizer's gradients, one tensor per device; none before it looked."""
    return list(scaler._per_optimizer_states.get(id(optimizer), {}).get("found_inf_per_device", {}).values())


def unscales_itself(optimizer: Any) -> bool:
    """Whether the optimizer divides the scale out inside its step, so that gradients carry it until then.

    True for the fused ones and for any optimizer that declares the same to GradScaler.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def is_flattened(parameter: Any) -> bool:
    """Whether FSDP1 holds the parameter: as one flat shard of several, or as this rank's piece of it."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def foreach_norms(tensors: list[Tensor], dtype: torch.dtype | None) -> Sequence[Tensor]:
    """The L2 norm of each tensor, by few kernels; accumulated and returned in `dtype`.

    Raises TypeError, AttributeError or NotImplementedError where one is None or sparse.
    """
    return torch._foreach_norm(tensors, 2, dtype)


def foreach_scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply each tensor in place."""
    torch._foreach_mul_(tensors, factor)


def foreach_subtract_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Subtract from each tensor another one, in place."""
    torch._foreach_sub_(tensors, others)


def foreach_copies(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each tensor."""
    return list(torch._foreach_add(tensors, 0))
