"""Reading numbers from a device without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

OnHost = Callable[[npt.NDArray[np.floating]], None]


@dataclass(slots=True)
class _Slot:
    """A row of pinned memory and the event that says when it has been filled."""

    memory: Tensor
    array: npt.NDArray[np.floating]
    event: Any


class LateReads:
    """Copies vectors to the host behind the device's back and hands them over, in order, once they are there.

    On CUDA a vector goes to pinned memory with an asynchronous copy and an event; `poll` looks whether the
    event has passed and never waits. Rows and events are used again: a steady run allocates nothing.
    Elsewhere the values are there at once and only wait to be polled.

    Example:
        >>> reads = LateReads()
        >>> reads.send(torch.tensor([1.0, 2.0]), lambda values: print(values.tolist()))
        >>> reads.poll()
        [1.0, 2.0]
    """

    # Pinning memory is slow, so it is done for several rows at a time; a device rarely lags further behind.
    _ROWS = 16

    def __init__(self) -> None:
        self._pending: deque[tuple[_Slot | None, npt.NDArray[np.floating], OnHost]] = deque()
        self._free: dict[tuple[int, torch.dtype], list[_Slot]] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def send(self, vector: Tensor, on_host: OnHost) -> None:
        """Start the copy of a vector.

        Args:
            vector: One-dimensional. On CUDA later work of the same stream may overwrite it; elsewhere it must
                stay as it is until it is polled.
            on_host: Gets the values as an array that is only valid during the call.
        """
        if vector.device.type != "cuda":
            self._pending.append((None, vector.cpu().numpy(), on_host))
            return
        free = self._free.setdefault((vector.numel(), vector.dtype), [])
        if not free:
            free.extend(self._pin(vector))
        slot = free.pop()
        slot.memory.copy_(vector, non_blocking=True)
        slot.event.record(torch.cuda.current_stream(vector.device))
        self._pending.append((slot, slot.array, on_host))

    def poll(self) -> None:
        """Hand over what has arrived."""
        while self._pending and ((slot := self._pending[0][0]) is None or slot.event.query()):
            self._hand_over()

    def drain(self, keep: int = 0) -> None:
        """Wait for everything that was sent and hand it over.

        Args:
            keep: How many of the newest to leave on their way.
        """
        while len(self._pending) > keep:
            if (slot := self._pending[0][0]) is not None:
                slot.event.synchronize()
            self._hand_over()

    def drop(self) -> None:
        """Forget what was not handed over."""
        self._pending.clear()

    def _hand_over(self) -> None:
        slot, array, on_host = self._pending.popleft()
        on_host(array)
        if slot is not None:
            self._free[slot.memory.numel(), slot.memory.dtype].append(slot)

    def _pin(self, vector: Tensor) -> list[_Slot]:
        rows = torch.empty(self._ROWS, vector.numel(), dtype=vector.dtype, pin_memory=True).unbind()
        return [_Slot(row, row.numpy(), torch.cuda.Event()) for row in rows]  # type: ignore[no-untyped-call]
