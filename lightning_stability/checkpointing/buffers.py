"""Buffers that are in no `state_dict`: those that training changes are saved with what an exact resume needs."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_stability import internals

_SPARSE = ("_indices", "_values", "crow_indices", "ccol_indices", "col_indices", "row_indices", "values")
"""What gives the parts of a sparse tensor; each layout has some of them."""


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
            dense = now is not None and not is_lazy(now) and now.layout == value.layout == torch.strided
            if now is not None and dense and now.shape == value.shape and now.dtype == value.dtype:
                now.data.copy_(value)
                continue
            device = now.device if now is not None else _device(self._module)
            if now is None and getattr(module, attribute, None) is not None:
                continue  # something else has that name
            if hasattr(module, attribute):  # it may be None until training fills it
                setattr(module, attribute, value.to(device))
            else:
                module.register_buffer(attribute, value.to(device), persistent=False)


def _non_persistent(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, inner in module.named_modules():
        for name, buffer in internals.non_persistent_buffers(inner).items():
            yield f"{prefix}.{name}" if prefix else name, buffer


def _fingerprint(buffer: Tensor) -> Any:
    if is_lazy(buffer) or buffer.device.type == "meta":
        return None
    if buffer.layout != torch.strided:
        parts = [part for name in _SPARSE if (part := _sparse_part(buffer, name)) is not None]
        return buffer.layout, buffer.shape, [_fingerprint(part) for part in parts]
    if buffer.is_quantized:
        return None
    data = buffer.detach().cpu().contiguous().flatten().view(torch.uint8)
    return buffer.shape, buffer.dtype, zlib.crc32(data.numpy().tobytes())


def _sparse_part(buffer: Tensor, name: str) -> Tensor | None:
    try:
        part: Tensor = getattr(buffer, name)()
    except RuntimeError:  # another layout's
        return None
    return part


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
