"""A copy of a checkpoint in host memory that training cannot change any more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_stability.internals import has_own_dispatch


class HostSnapshot:
    """Copies nested state to host memory, from a GPU to pinned memory and without waiting for it.

    The memory is used again by the next copy, so that only the first one allocates and pins. Tensors that share their
    numbers (tied weights) share them in the copy too.

    Example:
        >>> weight = torch.zeros(2)
        >>> taken, wait = HostSnapshot().take({"weight": weight, "step": [1]})
        >>> _ = weight.fill_(1.0)
        >>> wait()
        >>> taken
        {'weight': tensor([0., 0.]), 'step': [1]}
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[Any, ...], list[Tensor]] = {}

    def take(self, state: Any) -> tuple[Any, Callable[[], None]]:
        """Copy a state.

        Args:
            state: Nested dicts, lists and tuples of tensors and plain values. What an earlier call returned is
                overwritten.

        Returns:
            The copy, and a function that waits until it is complete.
        """
        unused = {kind: list(tensors) for kind, tensors in self._memory.items()}
        copies: dict[tuple[Any, ...], Tensor] = {}
        devices: set[torch.device] = set()

        def copy_tensor(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or has_own_dispatch(tensor):
                return _apart(tensor)
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            key = (*place, tensor.dtype, tensor.device)
            if tensor.numel() and key in copies:
                return copies[key]
            pinned = tensor.device.type == "cuda"
            kind = (tensor.dtype, tensor.shape, tensor.stride(), pinned)
            if unused.get(kind):
                memory = unused[kind].pop()
            else:
                memory = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
                self._memory.setdefault(kind, []).append(memory)
            memory.copy_(tensor, non_blocking=pinned)
            if pinned:
                devices.add(tensor.device)
            copies[key] = memory
            return memory

        taken = _copy_tree(state, copy_tensor)
        events = []
        for device in devices:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            events.append(event)

        def wait() -> None:
            for event in events:
                event.synchronize()

        return taken, wait


def _apart(tensor: Tensor) -> Tensor:
    """A copy of a tensor whose memory is not a plain one; the tensor itself where its class cannot be copied."""
    try:
        return tensor.cpu().clone()
    except NotImplementedError:
        return tensor


def _copy_tree(value: Any, copy_tensor: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return copy_tensor(value)
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps an OrderedDict's or a Counter's class
        for key, item in value.items():
            copied[key] = _copy_tree(item, copy_tensor)
        return copied
    if isinstance(value, (list, tuple)):
        items = [_copy_tree(item, copy_tensor) for item in value]
        if type(value) in (list, tuple):
            return type(value)(items)
        return type(value)(*items) if hasattr(value, "_fields") else copy.copy(value)
    if isinstance(value, (str, bytes, int, float, bool, type(None))):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever the user's own objects raise: the file will hold what it is when it is written
        return value
