"""Buffers that are in no `state_dict`: those that training changes are saved with what an exact resume needs."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_stability import internals


class HiddenBuffers:
    """The non-persistent buffers of a module, of which those that training has changed are saved.

    A table that a module computes once (positions, a causal mask) stays out of the checkpoint.

    Args:
        module: In `on_train_start`, before anything is restored.

    Example:
        >>> module = nn.Module()
        >>> for name in ("bank", "table"):
        ...     module.register_buffer(name, torch.zeros(2), persistent=False)
        >>> hidden = HiddenBuffers(module)
        >>> _ = module.bank.add_(1)
        >>> hidden.capture()
        {'bank': tensor([1., 1.])}
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._at_start = {name: _fingerprint(buffer) for name, buffer in _non_persistent(module)}
        self._restored: set[str] = set()

    def capture(self) -> dict[str, Tensor]:
        """Those of now that are not as they were, by name."""
        return {
            name: buffer
            for name, buffer in _non_persistent(self._module)
            if name in self._restored or _fingerprint(buffer) != self._at_start.get(name)
        }

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Set what `capture` returned; a buffer of another shape, or one that is not there yet, is made."""
        own = dict(self._module.named_buffers())
        for name, value in saved.items():
            owner, _, attribute = name.rpartition(".")
            try:
                module = self._module.get_submodule(owner)
            except AttributeError:  # the module has no such part any more
                continue
            self._restored.add(name)
            now = own.get(name)
            if now is not None and not is_lazy(now) and now.shape == value.shape and now.dtype == value.dtype:
                now.data.copy_(value)
                continue
            device = now.device if now is not None else _device(self._module)
            if now is None and hasattr(module, attribute):
                continue  # something else has that name
            module.register_buffer(attribute, value.to(device), persistent=False)


def _non_persistent(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, inner in module.named_modules():
        for name, buffer in internals.non_persistent_buffers(inner).items():
            yield f"{prefix}.{name}" if prefix else name, buffer


def _fingerprint(buffer: Tensor) -> Any:
    if is_lazy(buffer) or buffer.layout != torch.strided or buffer.is_quantized or buffer.device.type == "meta":
        return None
    data = buffer.detach().cpu().contiguous().flatten().view(torch.uint8)
    return buffer.shape, buffer.dtype, zlib.crc32(data.numpy().tobytes())


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
