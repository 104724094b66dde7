"""Gradient norms from a table of addresses: two kernels a step, however many gradients there are."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_stability.health.kernels import load_kernels

CHUNK = 2**14
"""Elements that one program adds up."""
BLOCK = 2**12
"""Elements that it loads at a time."""
RIDERS = 2
"""Numbers that can travel along in a row."""
_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_ROWS = 16

_data_ptr = Tensor.data_ptr
_numel = Tensor.numel
_is_contiguous = Tensor.is_contiguous
_dtype = operator.attrgetter("dtype")


class PointerNorms:
    """Norms of all gradients of some parameters, their total, and up to two numbers beside them, in one row.

    `torch._foreach_norm` makes a tensor for each norm, which takes the host longer than the device takes to read
    the gradients. Here the host looks at each gradient's address, and copies the addresses only when they have
    changed; as a rule the allocator gives each gradient the place that it had a step ago.

    Squares are added up in float64, always in the same order: the same gradients give the same bits.

    Args:
        parameters: Of one CUDA device; those of one dtype lie together.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._device = self._parameters[0].device
        self._index = self._parameters[0].get_device()
        self._numels = [p.numel() for p in self._parameters]
        self._dtypes = [p.dtype for p in self._parameters]
        self._width = len(self._parameters) + 1 + RIDERS
        self._stream: int | None = None
        self._addresses: list[int] = []
        self._aligned = False
        self._rows: list[Tensor] = []
        self._launches: dict[bool, tuple[list[_Launch], _Launch]] = {}
        self._no_rider = torch.zeros((), device=self._device)
        self._proven = False
        self.refused: str | None = None
        self._plan()

    @staticmethod
    def suit(parameters: Sequence[Tensor]) -> bool:
        """Whether gradients of such parameters can be measured here: plain ones on one NVIDIA GPU, with Triton."""
        return (
            len({p.device for p in parameters}) == 1
            and parameters[0].device.type == "cuda"
            and all(p.dtype in _DTYPES and not hasattr(p, "device_mesh") for p in parameters)
            and any(p.numel() for p in parameters)
            and load_kernels("pointer_kernels") is not None
        )

    def measure(self, riders: Sequence[Tensor] = ()) -> Tensor | None:
        """Take the norms of the gradients as they are now.

        Args:
            riders: At most two fp32 numbers on the same device.

        Returns:
            A new float64 row: each parameter's norm (0 without a gradient), the total, the riders. None if some
            gradient is not what it should be, or if the kernels do not run here.
        """
        stream = None if self.refused else self._current_stream()
        try:
            addresses = None if stream is None else self._look()
        except RuntimeError:  # a sparse gradient has no address
            addresses = None
        if stream is None or addresses is None:
            return None
        if stream != self._stream:
            self._settle(stream)
        if addresses != self._addresses:
            self._send(addresses)
        row = self._new_row()
        try:
            self._launch(row, riders)
        except Exception as error:  # no compiler, an old driver, an old GPU: torch's own pass does it too
            if self._proven:
                raise
            self.refused = f"{type(error).__name__}: {error}"
            return None
        self._proven = True
        return row

    def _look(self) -> list[int] | None:
        """Every gradient's address, 0 where there is none; None if one is not a plain row of numbers."""
        gradients: list[Any] = [p.grad for p in self._parameters]
        numels, dtypes = self._numels, self._dtypes
        try:
            addresses = list(map(_data_ptr, gradients))
        except TypeError:
            addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
            places = [place for place, gradient in enumerate(gradients) if gradient is not None]
            gradients = [gradients[place] for place in places]
            numels, dtypes = [numels[place] for place in places], [dtypes[place] for place in places]
        # All has to be as the kernels take it to be: else they would read what is not there.
        fit = (
            list(map(_numel, gradients)) == numels
            and list(map(_dtype, gradients)) == dtypes
            and (all(map(_is_contiguous, gradients)) or all(map(_fills_its_memory, gradients)))
            # an address of this device's is no other's, and nothing but a plain tensor gives it
            and (addresses == self._addresses or all(map(self._is_plain, gradients)))
        )
        return addresses if fit else None

    def _is_plain(self, gradient: Tensor) -> bool:
        return type(gradient) is Tensor and gradient.get_device() == self._index

    def _current_stream(self) -> int | None:
        if self._device.type != "cuda":
            return 0
        if torch.cuda.current_device() != self._index:
            return None
        return torch.cuda.current_stream(self._device).cuda_stream

    def _plan(self) -> None:
        """Cut the parameters into chunks, once."""
        counts = [-(-numel // CHUNK) for numel in self._numels]
        ends = np.cumsum(counts)
        firsts = ends - counts
        self._chunks = int(ends[-1])
        tensor = np.repeat(np.arange(len(counts)), counts)
        start = (np.arange(self._chunks) - firsts[tensor]) * CHUNK
        length = np.minimum(np.array(self._numels)[tensor] - start, CHUNK)
        # each norm's chunks, and last the total's
        bounds = np.stack([np.append(firsts, 0), np.append(ends, self._chunks)], axis=1)
        self._chunk_tensor = self._on_device(tensor, torch.int32)
        self._chunk_start = self._on_device(start, torch.int64)
        self._chunk_length = self._on_device(length, torch.int32)
        self._bounds = self._on_device(bounds, torch.int32)
        # One launch for each dtype: its name, its first chunk, the one behind its last.
        self._sections: list[tuple[str, int, int]] = []
        for dtype in dict.fromkeys(self._dtypes):
            places = [i for i, other in enumerate(self._dtypes) if other == dtype]
            first, end = int(firsts[places[0]]), int(ends[places[-1]])
            if first < end:
                self._sections.append((_DTYPES[dtype], first, end))

    def _on_device(self, values: Any, dtype: torch.dtype) -> Tensor:
        return self._pinned(values, dtype).to(self._device, non_blocking=True)

    def _pinned(self, values: Any, dtype: torch.dtype) -> Tensor:
        # torch does not give pinned memory out again before the copies out of it have ended
        # (a list: torch pins nothing that comes from numpy)
        numbers = values.tolist() if isinstance(values, np.ndarray) else values
        return torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=self._device.type == "cuda")

    def _settle(self, stream: int) -> None:
        """Memory that the kernels write belongs to one stream: another one would not wait for it."""
        self._stream = stream
        self._partials = torch.empty(self._chunks, dtype=torch.float64, device=self._device)
        self._table = torch.empty(len(self._parameters), dtype=torch.int64, device=self._device)
        self._addresses, self._rows, self._launches = [], [], {}

    def _send(self, addresses: list[int]) -> None:
        """Bring the addresses to the device, behind the kernels that still read the last ones."""
        self._table.copy_(self._pinned(addresses, torch.int64), non_blocking=True)
        self._addresses = addresses
        self._aligned = not any(address % 16 for address in addresses)
        if self._aligned not in self._launches:
            self._launches[self._aligned] = self._make_launches(self._aligned)

    def _make_launches(self, aligned: bool) -> tuple[list[_Launch], _Launch]:
        found = load_kernels("pointer_kernels")
        assert found is not None
        tables = (self._chunk_tensor, self._chunk_start, self._chunk_length, self._partials)
        sums = []
        for name, first, end in self._sections:
            tensors = (self._table, *(table[first:end] for table in tables))
            constants = (getattr(found.tl, name), aligned, CHUNK, BLOCK)
            sums.append(_Launch(found.sum_squares, end - first, tensors, constants, warps=8))
        fill = _Launch(found.fill_row, self._width, (self._partials, self._bounds), (2**10,), warps=4)
        return sums, fill

    def _new_row(self) -> Tensor:
        if not self._rows:
            block = torch.empty(_ROWS, self._width, dtype=torch.float64, device=self._device)
            self._rows = list(block.unbind())
        return self._rows.pop()

    def _launch(self, row: Tensor, riders: Sequence[Tensor]) -> None:
        assert self._stream is not None
        sums, fill = self._launches[self._aligned]
        for launch in sums:
            launch(self._stream)
        first = riders[0] if riders else self._no_rider
        second = riders[1] if len(riders) > 1 else self._no_rider
        fill(self._stream, first, second, row)


class _Launch:
    """A kernel with its grid, its first arguments and its constants.

    Triton looks at each argument at every call, to find what it has compiled for such ones. Ours do not change, so from
    the second call on the compiled kernel is called by itself, as in Triton's tutorials, and with plain addresses.
    """

    def __init__(
        self, kernel: Any, programs: int, tensors: tuple[Tensor, ...], constants: tuple[Any, ...], warps: int
    ) -> None:
        self._kernel = kernel
        self._grid = (programs, 1, 1)
        self._tensors = tensors
        self._pointers = tuple(map(_data_ptr, tensors))
        self._constants = constants
        self._warps = warps
        self._compiled: Callable[..., Any] | None = None
        self._may_skip = True

    def __call__(self, stream: int, *more: Tensor) -> None:
        """Launch it on the current stream.

        Args:
            stream: The current stream's handle.
            more: What comes between the first arguments and the constants.
        """
        if self._compiled is not None:
            try:
                self._compiled(*self._pointers, *map(_data_ptr, more), *self._constants, stream=stream)
                return
            except TypeError:  # another Triton, whose compiled kernels take other arguments
                self._compiled, self._may_skip = None, False
        compiled = self._kernel[self._grid](*self._tensors, *more, *self._constants, num_warps=self._warps)
        if compiled is not None and self._may_skip:  # Triton's interpreter returns None
            self._compiled = compiled[self._grid]


def _fills_its_memory(gradient: Tensor) -> bool:
    return _is_dense(gradient.size(), gradient.stride())


@functools.lru_cache(maxsize=1024)
def _is_dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor's elements lie side by side, each once, in whatever order: as in channels_last.

    Example:
        >>> _is_dense((2, 3), (1, 2)), _is_dense((2, 3), (0, 1)), _is_dense((2, 3), (6, 2))
        (True, False, False)
    """
    expected = 1
    for step, count in sorted((step, count) for step, count in zip(stride, size, strict=True) if count != 1):
        if step != expected:
            return False
        expected *= count
    return True
