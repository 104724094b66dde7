"""Reading numbers from a device without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

OnHost = Callable[[npt.NDArray[np.floating]], None]


@dataclass(slots=True)
class _Pending:
    buffer: Tensor
    event: torch.cuda.Event
    on_host: OnHost


class LateReads:
    """Copies vectors to the host behind the device's back and hands them over, in order, once they are there.

    On CUDA a vector goes to pinned memory with an asynchronous copy and an event; `poll` looks whether the
    event has passed and never waits. Buffers and events are used again, so that a steady run allocates
    nothing. Elsewhere the values are handed over at once (on the CPU they are there already).

    Example:
        >>> reads = LateReads()
        >>> reads.send(torch.tensor([1.0, 2.0]), lambda values: print(values.tolist()))
        [1.0, 2.0]
    """

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()
        self._free: dict[tuple[int, torch.dtype], list[tuple[Tensor, torch.cuda.Event]]] = {}

    def send(self, vector: Tensor, on_host: OnHost) -> None:
        """Start the copy of a vector.

        Args:
            vector: One-dimensional. On CUDA it may be overwritten by later work of the same stream.
            on_host: Gets the values as an array that is only valid during the call.
        """
        if vector.device.type != "cuda":
            on_host(vector.cpu().numpy())
            return
        free = self._free.get((vector.numel(), vector.dtype))
        if free:
            buffer, event = free.pop()
        else:
            buffer = torch.empty(vector.numel(), dtype=vector.dtype, pin_memory=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        buffer.copy_(vector, non_blocking=True)
        event.record(torch.cuda.current_stream(vector.device))
        self._pending.append(_Pending(buffer, event, on_host))

    def poll(self) -> None:
        """Hand over what has arrived."""
        while self._pending and self._pending[0].event.query():  # type: ignore[no-untyped-call]
            self._hand_over(self._pending.popleft())

    def drain(self) -> None:
        """Wait for everything that was sent and hand it over."""
        while self._pending:
            self._pending[0].event.synchronize()
            self._hand_over(self._pending.popleft())

    def drop(self) -> None:
        """Forget what has not arrived."""
        self._pending.clear()

    def _hand_over(self, pending: _Pending) -> None:
        pending.on_host(pending.buffer.numpy())
        key = (pending.buffer.numel(), pending.buffer.dtype)
        self._free.setdefault(key, []).append((pending.buffer, pending.event))
