"""Every private name of Lightning and torch that the package uses, once each.

`tests/test_internals.py` has a test for each of them, which fails when a new version moves it. Public names are used
where they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ABSENT = object()


class Overrides:
    """Attributes that are set on instances for a while; `restore` undoes them, the last one first.

    What somebody else has set over one of ours in the meantime is left as it is.

    Example:
        >>> class Loop:
        ...     def advance(self):
        ...         return "its own"
        >>> loop, overrides = Loop(), Overrides()
        >>> overrides.set(loop, "advance", lambda: "ours")
        >>> loop.advance()
        'ours'
        >>> overrides.restore()
        >>> loop.advance()
        'its own'
    """

    def __init__(self) -> None:
        self._stack: list[tuple[Any, str, Any, Any]] = []

    def set(self, instance: Any, name: str, value: Any) -> None:
        """Set an attribute of one instance; its class is left alone."""
        before = vars(instance).get(name, _ABSENT)
        setattr(instance, name, value)
        self._stack.append((instance, name, value, before))

    def restore(self) -> None:
        """Undo everything that was set."""
        while self._stack:
            instance, name, value, before = self._stack.pop()
            if vars(instance).get(name, _ABSENT) is not value:
                continue
            if before is _ABSENT:
                delattr(instance, name)
            else:
                setattr(instance, name, before)


# --- The training loop ---


# --- Precision plugins and optimizers ---


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


# --- Loggers ---


def logger_prefix(logger: Any) -> str:
    """What a logger puts in front of each key; its `log_metrics` does, and who goes past it has to."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


# --- Checkpoints, loop progress and data loaders ---


# --- Modules, metrics and tensors ---


# --- Autograd and dispatch, for diagnosis ---
