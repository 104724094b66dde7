"""Check sums of tensors' bits, made on the device where the tensors lie."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_stability.health.late_reads import begin_read
from lightning_stability.health.values import named_tensors
from lightning_stability.internals import has_own_dispatch, strided_values

_FACTOR = 2654435761
_KEPT = 64
_WIDER = {8: (torch.int64,), 4: (torch.int32,), 2: (torch.int32, torch.int16), 1: (torch.int32, torch.uint8)}
"""What the bits of elements of so many bytes are read as: the first that fits."""


class BatchChecksum:
    """The check sum of a batch: any other bit, shape, dtype or order of samples gives another one.

    Tensors on a device are summed there, weighted by position, and nothing is read by the host.

    Example:
        >>> checksum = BatchChecksum()
        >>> on_host, on_device = checksum.of({"eeg": torch.zeros(2, 3), "label": torch.tensor([0, 1])})
        >>> on_host == checksum.of({"eeg": torch.zeros(2, 3), "label": torch.tensor([1, 0])})[0]
        False
    """

    def __init__(self) -> None:
        self._weights: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}

    @torch.no_grad()
    def of(self, batch: object) -> tuple[int, list[Tensor]]:
        """Sum up a batch.

        Args:
            batch: Tensors in any nesting; anything else in it does not count.

        Returns:
            What is known on the host; and one int64, 0-dimensional, for each other device, still there.
        """
        on_host, rows = 0, dict[torch.device, list[Tensor]]()
        for name, tensor in named_tensors(batch):
            on_host = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), on_host)
            values = _local(tensor)
            if values is None:
                continue
            if values.device.type == "cpu":
                on_host = zlib.crc32(values.contiguous().reshape(-1).view(torch.uint8).numpy().data, on_host)
            else:
                rows.setdefault(values.device, []).append(self._of_rows(values))
        return on_host, [self._of_all(torch.cat(found)) for found in rows.values()]

    def _of_rows(self, values: Tensor) -> Tensor:
        """One number for each position in dimension 0."""
        words = _words(values.reshape(values.shape[0] if values.dim() > 1 else 1, -1))
        weights = self._weights_of(words.device, words.shape[1], torch.int32 if words.itemsize < 8 else torch.int64)
        return (words * weights).sum(1, dtype=torch.int64)

    def _of_all(self, rows: Tensor) -> Tensor:
        return (rows * self._weights_of(rows.device, rows.numel(), torch.int64)).sum()

    def _weights_of(self, device: torch.device, count: int, dtype: torch.dtype) -> Tensor:
        """Odd numbers, so that no changed bit is lost in the product."""
        key = (device, count, dtype)
        if key not in self._weights:
            while len(self._weights) >= _KEPT:  # batches of many shapes
                del self._weights[next(iter(self._weights))]
            mixed = torch.arange(1, count + 1, device=device) * _FACTOR
            self._weights[key] = ((mixed ^ (mixed >> 15)) | 1).to(dtype)
        return self._weights[key]


def checksum_of_all(tensors: Iterable[Tensor]) -> int:
    """One number for the bits of many tensors, in their order; waits for the devices.

    One changed bit anywhere gives another number. Of a sharded tensor this rank's part counts.

    Example:
        >>> weight = torch.ones(3)
        >>> before = checksum_of_all([weight])
        >>> weight.view(torch.int32)[1] ^= 1
        >>> checksum_of_all([weight]) == before
        False
    """
    return begin_checksum(tensors)()


@torch.no_grad()
def begin_checksum(tensors: Iterable[Tensor]) -> Callable[[], int]:
    """The same; the devices add while the host goes on, and what it returns waits for them."""
    sums: dict[torch.device, list[Tensor]] = {}
    total = 0
    for place, tensor in enumerate(tensors, start=1):
        values = _local(tensor)
        if values is None:
            continue
        words = _widest(values.reshape(-1))
        if words.device.type == "cpu":  # numpy's sum is many times as fast as torch's
            total += int(words.numpy().sum(dtype=np.int64)) * (place * _FACTOR | 1)
        else:
            sums.setdefault(words.device, []).append(words.sum(dtype=torch.int64))
    arriving = []
    for device, found in sums.items():
        places = torch.arange(1, len(found) + 1, device=device) * _FACTOR
        arriving.append(begin_read((torch.stack(found) * (places | 1)).sum()))
    return lambda: sum((arrived() for arrived in arriving), start=total) % 2**64


def _local(tensor: Tensor) -> Tensor | None:
    """What this rank stores of a tensor; None if that is nothing, or of a kind that has no bits to look at."""
    try:
        if is_lazy(tensor) or tensor.device.type == "meta" or tensor.is_quantized:
            return None
        if hasattr(tensor, "to_local"):
            tensor = tensor.to_local()
        if tensor.is_nested:
            tensor = torch.cat([part.reshape(-1) for part in tensor.unbind()])
        if has_own_dispatch(tensor):
            return None
        values = strided_values(tensor.detach())
        return values if values.numel() else None
    except (RuntimeError, AttributeError, NotImplementedError):  # a kind that nobody foresaw
        return None


def _words(rows: Tensor) -> Tensor:
    """The bits of a matrix as integers, four or eight bytes at a time where the rows can be cut like that."""
    if rows.is_complex():
        rows = torch.view_as_real(rows).reshape(rows.shape[0], -1)
    rows = rows.contiguous()
    for dtype in _WIDER[rows.itemsize]:
        if (rows.shape[1] * rows.itemsize) % dtype.itemsize == 0 and rows.storage_offset() * rows.itemsize % 8 == 0:
            return rows.view(dtype)
    return rows.view(_WIDER[rows.itemsize][-1])


def _widest(flat: Tensor) -> Tensor:
    """The bits of a vector as integers, eight bytes at a time where that is possible."""
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    flat = flat.contiguous()
    if (flat.numel() * flat.itemsize) % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0:
        return flat.view(torch.int64)
    return flat.view(_WIDER[flat.itemsize][-1])
