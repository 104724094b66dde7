"""Reading numbers from a device without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.floating[Any]]
Part = Tensor | Sequence[Tensor]
"""One vector, or 0-dimensional tensors of one dtype that become a vector on their way."""
OnHost = Callable[[list[Array]], None]


class LateReads:
    """Copies numbers to the host without waiting for the device, and hands them over in order once they are there.

    Rows of numbers are collected on the device until `every` of them go to pinned memory together: gathered
    by one kernel for every hundred or so numbers, with one asynchronous copy for each dtype and one event.
    `poll` looks whether the event has passed and never waits. Pinned memory and events are used again: a
    steady run allocates none.

    Args:
        every: How many rows travel together. More cost less, and arrive later.

    Example:
        >>> reads = LateReads(every=2)
        >>> for step in (1.0, 2.0):
        ...     reads.send([torch.tensor([step, 10 * step])], lambda arrays: print(arrays[0].tolist()))
        >>> reads.poll()
        [1.0, 10.0]
        [2.0, 20.0]
    """

    # Pinning memory is slow, so it is done for this many rows at a time; a device rarely lags further behind.
    _ROWS = 16

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self._rows: deque[_Row] = deque()
        self._collected: list[tuple[_Row, Sequence[Part]]] = []
        self._device: torch.device | None = None  # of what is collected
        self._free: list[_Batch] = []

    def __len__(self) -> int:
        return len(self._rows)

    def send(self, parts: Sequence[Part], on_host: OnHost) -> None:
        """Put numbers on their way to the host.

        `parts` is not empty and on one device; nobody may write them again before they are handed over. `on_host` gets
        one array for each part; they are only valid during the call.
        """
        part = parts[0]
        device = part.device if isinstance(part, Tensor) else part[0].device
        if device.type != "cuda":
            self.hold([_vector(part).numpy(force=True) for part in parts], on_host)
            return
        if self._collected and device != self._device:
            self._start()
        self._device = device
        row = _Row(on_host)
        self._rows.append(row)
        self._collected.append((row, parts))
        if len(self._collected) >= self.every:
            self._start()

    def hold(self, arrays: list[Array], on_host: OnHost) -> None:
        """The same for numbers that are on the host already: they only wait for their turn."""
        self._rows.append(_Row(on_host, arrays))

    def poll(self) -> None:
        """Hand over what has arrived, if that is `every` rows or more."""
        if len(self._rows) >= self.every:
            while self._rows and self._rows[0].has_arrived():
                self._hand_over()

    def drain(self, keep: int = 0) -> None:
        """Wait for everything that was sent, except the newest `keep` rows, and hand it over."""
        self._start()
        while len(self._rows) > keep:
            self._rows[0].wait()
            self._hand_over()

    def drop(self) -> None:
        """Forget what was not handed over."""
        self._rows.clear()
        self._collected.clear()

    def _hand_over(self) -> None:
        row = self._rows.popleft()
        assert row.arrays is not None
        row.on_host(row.arrays)
        if row.returns is not None:
            self._free.append(row.returns)

    def _start(self) -> None:
        """Gather the rows collected so far and start their copy."""
        collected, self._collected = self._collected, []
        if not collected:
            return
        assert self._device is not None
        with torch.inference_mode():  # half the host's time for each tensor
            vectors, places = _gather([parts for _, parts in collected])
            batch = self._batch(self._device, sum(vector.nbytes for vector in vectors.values()))
            arrays = batch.receive(vectors)
        for (row, _), of_row in zip(collected, places, strict=True):
            row.event = batch.event
            row.arrays = [arrays[kind][start:end] for kind, start, end in of_row]
        collected[-1][0].returns = batch

    def _batch(self, device: torch.device, size: int) -> _Batch:
        for index, batch in enumerate(self._free):
            if batch.device == device and batch.memory.numel() >= size:
                return self._free.pop(index)
        # Half as much again: a step that brings more numbers than others needs no new memory.
        self._free += _pin(device, size + size // 2, max(2, self._ROWS // self.every))
        return self._free.pop()


_Kind = tuple[torch.dtype, bool]
"""A part's dtype, and whether it is a vector already: what one call can gather."""


@dataclass(slots=True, eq=False)
class _Row:
    """Whom to hand what to, and when."""

    on_host: OnHost
    arrays: list[Array] | None = None  # None until the row is on its way
    event: Any = None
    returns: _Batch | None = None  # the batch that this row is the last of

    def has_arrived(self) -> bool:
        return self.arrays is not None and (self.event is None or self.event.query())

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


@dataclass(slots=True, eq=False)
class _Batch:
    """Pinned memory and the event that says when it has been filled."""

    device: torch.device
    memory: Tensor
    event: Any

    def receive(self, vectors: dict[_Kind, Tensor]) -> dict[_Kind, Array]:
        arrays, start = {}, 0
        # the widest numbers first: each vector then starts where its dtype may
        for kind, vector in sorted(vectors.items(), key=lambda item: -item[1].itemsize):
            place = self.memory[start : start + vector.nbytes].view(vector.dtype)
            place.copy_(vector, non_blocking=True)
            arrays[kind] = place.numpy()
            start += vector.nbytes
        self.event.record(torch.cuda.current_stream(self.device))
        return arrays


def _pin(device: torch.device, capacity: int, count: int) -> list[_Batch]:
    memory = torch.empty(count, capacity // 8 * 8 + 8, dtype=torch.uint8, device="cpu", pin_memory=True)
    events = (torch.cuda.Event() for _ in range(count))  # type: ignore[no-untyped-call]
    return [_Batch(device, *pair) for pair in zip(memory.unbind(), events, strict=True)]


def _gather(rows: Sequence[Sequence[Part]]) -> tuple[dict[_Kind, Tensor], list[list[tuple[_Kind, int, int]]]]:
    """One vector for each kind of part, and where in it each row's parts went."""
    tensors: dict[_Kind, list[Tensor]] = {}
    ends: dict[_Kind, int] = {}
    places = []
    for parts in rows:
        of_row = []
        for part in parts:
            if isinstance(part, Tensor):
                kind, length = (part.dtype, True), part.numel()
                tensors.setdefault(kind, []).append(part)
            else:
                kind, length = (part[0].dtype, False), len(part)
                tensors.setdefault(kind, []).extend(part)
            start = ends.get(kind, 0)
            ends[kind] = start + length
            of_row.append((kind, start, start + length))
        places.append(of_row)
    return {kind: _joined(kind, members) for kind, members in tensors.items()}, places


def _joined(kind: _Kind, tensors: list[Tensor]) -> Tensor:
    if not kind[1]:
        return torch.stack(tensors)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _vector(part: Part) -> Tensor:
    return part if isinstance(part, Tensor) else torch.stack(list(part))


def begin_read(values: Tensor) -> Callable[[], Any]:
    """Send numbers to the host; what it returns waits until they are there, and returns them as `tolist` does.

    What the device is given to do after this is not waited for.

    Example:
        >>> arrived = begin_read(torch.tensor([1, 2]))
        >>> arrived()
        [1, 2]
    """
    if values.device.type != "cuda":
        read = values.tolist()
        return lambda: read
    memory = torch.empty_like(values, device="cpu", pin_memory=True)
    memory.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(values.device))

    def wait() -> Any:
        event.synchronize()
        return memory.tolist()

    return wait
