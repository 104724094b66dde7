"""A copy of a checkpoint in host memory that training cannot change any more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_stability import internals

_Kind = tuple[torch.dtype, torch.Size, tuple[int, ...], bool]
"""Of memory: dtype, shape, strides, whether it is pinned."""


class HostSnapshot:
    """Copies nested state to host memory, from a GPU to pinned memory and without waiting for it.

    The memory is used again by the next copy, so that only the first one allocates and pins. Tensors that share their
    numbers (tied weights) share them in the copy too. Of a sharded tensor (`DTensor`) this rank's part is copied.

    Example:
        >>> weight = torch.zeros(2)
        >>> taken, wait = HostSnapshot().take({"weight": weight, "step": [1]})
        >>> _ = weight.fill_(1.0)
        >>> wait()
        >>> taken
        {'weight': tensor([0., 0.]), 'step': [1]}
    """

    def __init__(self) -> None:
        self._memory: dict[_Kind, list[Tensor]] = {}
        self._forget()

    def begin(self, tensors: Iterable[Tensor]) -> None:
        """Begin to copy tensors that `take` will be asked for next; the device copies while the host goes on.

        Args:
            tensors: Nothing may change them before `take`, except what the device does after the copy.
        """
        self._forget()
        for tensor in tensors:
            self._copy(getattr(tensor, "to_local", lambda: tensor)())  # noqa: B023

    def take(self, state: Any) -> tuple[Any, Callable[[], None]]:
        """Copy a state.

        Args:
            state: Nested dicts, lists and tuples of tensors and plain values. What an earlier call returned is
                overwritten.

        Returns:
            The copy, and a function that waits until it is complete.
        """
        taken = _copy_tree(state, self._copy)
        events = []
        for device in self._devices:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            events.append(event)
        self._forget()

        def wait() -> None:
            for event in events:
                event.synchronize()

        return taken, wait

    def _forget(self) -> None:
        """All memory can be written to."""
        self._unused = {kind: list(tensors) for kind, tensors in self._memory.items()}
        self._copies: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._devices: set[torch.device] = set()

    def _copy(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if hasattr(tensor, "to_local"):
            return internals.with_local_part(tensor, self._copy(tensor.to_local()))
        has_memory = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
        if not has_memory or internals.has_own_dispatch(tensor):
            return _apart(tensor)
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        key = (*place, tensor.dtype, tensor.device)
        if tensor.numel() and key in self._copies:
            return self._copies[key][1]
        pinned = tensor.device.type == "cuda"
        kind = (tensor.dtype, tensor.shape, tensor.stride(), pinned)
        if self._unused.get(kind):
            memory = self._unused[kind].pop()
        else:
            memory = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
            self._memory.setdefault(kind, []).append(memory)
        memory.copy_(tensor, non_blocking=pinned)
        if pinned:
            self._devices.add(tensor.device)
        self._copies[key] = tensor, memory  # held, so that nothing else comes to lie at its address
        return memory


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
