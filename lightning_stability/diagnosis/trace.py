"""Every operation of a replayed step: what went in, what came out, and the line of the user's code that asked for it.

Values are followed by the memory that holds them, so that views need no care: an operation *writes* a piece of
memory, and a later one that reads it has the newest write as its source. A tensor nobody wrote during the step is a
*leaf*: a parameter, a buffer, an entry of the batch, or a constant.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_stability.diagnosis.errors import OutOfTimeError
from lightning_stability.diagnosis.places import Place, PlaceFinder
from lightning_stability.diagnosis.ranges import (
    Range,
    dense_values,
    has_floats,
    nonfinite_rows,
    range_of,
    rows_born,
    rows_of,
)
from lightning_stability.health.values import named_tensors
from lightning_stability.internals import StorageKey, storage_key, strided_values

_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "empty_like"}
_BATCH_NORMS = {"native_batch_norm": (3, 4), "cudnn_batch_norm": (3, 4), "miopen_batch_norm": (3, 4)}
"""Operations that write arguments of theirs without saying so, and which."""
_CASTS = {"aten._to_copy", "aten.clone"}
_NUMBERS = {int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format}


_UNKNOWN = Range(math.nan, math.nan)
"""Of whole numbers, until it is asked for."""


@dataclass(slots=True)
class Input:
    """A tensor that an operation read."""

    range: Range
    name: str | None = None
    """Its name, if it is a leaf that has one."""
    source: int | None = None
    """The operation that wrote what is not finite in it; None for a leaf, or where all is finite."""
    reaches: bool = True
    """Whether what is not finite in it can be what is not finite in the result."""
    rows: tuple[int, ...] = ()
    """Where it is not finite along its first dimension."""
    length: int = 0
    """Of the first dimension."""
    writer: int | None = None
    """The operation that wrote it last, where it is of floating numbers."""
    is_whole: bool = False
    """Whether it is of whole numbers or truth values."""


@dataclass(slots=True)
class Operation:
    """One operation that was dispatched."""

    index: int
    name: str
    """Such as `aten.log.default`."""
    place: Place
    inputs: list[Input]
    output: Range
    """Of its first result that is not finite, else of its first."""
    rows: tuple[int, ...] = ()
    length: int = 0
    scalars: tuple[float, ...] = ()
    """Numbers among its arguments that are not finite."""
    dtype: torch.dtype = torch.float32
    in_optimizer: bool = False
    numbers: tuple[float, ...] = ()
    """Numbers among its arguments."""


@dataclass(slots=True)
class _Memory:
    """A piece of memory that operations of the step wrote."""

    key: StorageKey
    writes: list[tuple[int, Range]] = field(default_factory=list)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation that is dispatched while it is active.

    Args:
        deadline: In the clock's seconds.

    Raises:
        OutOfTimeError: From within an operation, when the deadline has passed.
    """

    def __init__(
        self, module: nn.Module, deadline: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.in_optimizer = False
        """Whether the optimizer's step is under way."""
        self._deadline, self._clock = deadline, clock
        self._places = PlaceFinder(module)
        self._memories: dict[int, _Memory] = {}
        self._names: dict[int, list[tuple[str, Tensor]]] = {}
        self._leaves: dict[Any, tuple[Range, Tensor]] = {}
        self._read_numbers: dict[str, int] = {}
        self.batch_size = 0
        self._module = module
        self._name(module.named_parameters())
        self._name(module.named_buffers())

    def name_batch(self, batch: Any) -> None:
        """The batch that is replayed next.

        Args:
            batch: As `training_step` gets it.
        """
        entries = list(named_tensors(batch))
        self._name(entries)
        self.batch_size = next((len(tensor) for _, tensor in entries if tensor.dim()), 0)

    def writer_of(self, tensor: Tensor) -> int | None:
        """The newest operation that wrote something non-finite into a tensor's memory; None if none did."""
        memory = self._memories.get(storage_key(tensor))
        return None if memory is None else _newest_nonfinite(memory)

    def spoilt_parameters(self) -> list[tuple[str, int]]:
        """The parameters that something else than the optimizer wrote non-finite values into, and which operation."""
        writers = ((name, self.writer_of(p.data)) for name, p in self._module.named_parameters())
        return [(name, i) for name, i in writers if i is not None and not self.operations[i].in_optimizer]

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of a parameter, buffer or entry of the batch."""
        candidates = self._names.get(storage_key(tensor), [])
        if len(candidates) < 2:
            return candidates[0][0] if candidates else None
        same = (n for n, t in candidates if t.shape == tensor.shape and t.data_ptr() == tensor.data_ptr())
        return next(same, candidates[0][0])

    def maker_of(self, entry: Input) -> str | None:
        """The name of the operation that made an input, casts aside; `"count"` for whole numbers.

        Args:
            entry: What an operation read.
        """
        while entry.writer is not None:
            operation = self.operations[entry.writer]
            if operation.name not in _CASTS or not operation.inputs:
                return operation.name
            entry = operation.inputs[0]
        return "count" if entry.is_whole else None

    def reader_of_number(self, number: float) -> int | None:
        """The newest operation that read a non-finite number into Python, as `Tensor.item` does."""
        return self._read_numbers.get(str(number))

    def __enter__(self) -> Trace:
        """Record from now on what the calling function asks for."""
        self._places.outermost = sys._getframe(1)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Record no more."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._places.outermost = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and record it."""
        if self._clock() > self._deadline:
            raise OutOfTimeError
        kwargs = kwargs or {}
        name = func._schema.name.replace("::", ".")
        place = self._places.here()
        if name.startswith(("aten._foreach_", "aten._fused_")):
            return self._run_many(func, name, place, args, kwargs)
        short = name.rpartition(".")[2]
        read, written = _arguments(func._schema, short, args, kwargs)
        inputs = [(tensor, *self._look_at(tensor)) for tensor in read]
        out = func(*args, **kwargs)
        results = [tensor for tensor in _tensors((out,)) if not self._is_view(tensor, written, args)]
        results += [tensor for tensor in written if all(tensor is not result for result in results)]
        if short == "_local_scalar_dense" and isinstance(out, float) and not math.isfinite(out):
            self._read_numbers[str(out)] = len(self.operations)
            self._record(name, place, inputs, [args[0]], args, kwargs)
        elif results:
            self._record(name, place, inputs, results, args, kwargs)
        return out

    def _run_many(self, func: Any, name: str, place: Place, args: Any, kwargs: Any) -> Any:
        """An operation on lists of tensors is one on each."""
        lists = [value for value in args if isinstance(value, (list, tuple)) and value and all(map(_is_tensor, value))]
        of_each = list(zip(*(tensors for tensors in lists if len(tensors) == len(lists[0])), strict=True))
        inputs = [[(tensor, *self._look_at(tensor)) for tensor in tensors] for tensors in of_each]
        out = func(*args, **kwargs)
        if name.startswith("aten._fused_"):
            results = [list(tensors) for tensors in of_each]
        else:
            results = [[tensor] for tensor in (lists[0] if func._schema.is_mutable else out)]
        for read, written in zip(inputs, results, strict=True):
            self._record(name, place, read, written, [a for a in args if not isinstance(a, (list, tuple))], kwargs)
        return out

    def _record(self, name: str, place: Place, inputs: Any, results: list[Tensor], args: Any, kwargs: Any) -> None:
        results = [tensor for tensor in results if has_floats(tensor)]
        if not results:
            return
        ranges = [range_of(tensor) for tensor in results]
        worst = next((i for i, r in enumerate(ranges) if r.nonfinite), 0)
        operation = Operation(len(self.operations), name, place, [], ranges[worst])
        operation.dtype, operation.in_optimizer = results[worst].dtype, self.in_optimizer
        operation.inputs = [entry for _, entry, _ in inputs]
        operation.numbers = tuple(value for value in args if type(value) in (int, float))
        if ranges[worst].nonfinite:
            for tensor, entry, _ in inputs:
                if not has_floats(tensor):
                    entry.range = range_of(tensor.double())
            operation.scalars = tuple(_nonfinite_numbers([*args, *kwargs.values()]))
            operation.rows, operation.length = rows_born(results[worst], [tensor for tensor, _, _ in inputs])
            _mark_what_reaches(results[worst], inputs, name.rpartition(".")[2])
        self.operations.append(operation)
        for tensor, values in zip(results, ranges, strict=True):
            self._write(tensor, operation.index, values)

    def _write(self, tensor: Tensor, index: int, written: Range) -> None:
        key = storage_key(tensor)
        memory = self._memories.get(key)
        if memory is None:
            memory = self._memories[key] = _Memory(StorageKey(tensor))
        values = strided_values(tensor)
        if values.numel() * values.element_size() >= values.untyped_storage().nbytes():
            memory.writes.clear()
        memory.writes.append((index, written))

    def _look_at(self, tensor: Tensor) -> tuple[Input, Tensor | None]:
        """What an operation is about to read, and where it is not finite."""
        memory = self._memories.get(storage_key(tensor))
        if not has_floats(tensor):
            return Input(_UNKNOWN, self.name_of(tensor), is_whole=not tensor.is_floating_point()), None
        writer = memory.writes[-1][0] if memory is not None and memory.writes else None
        if memory is None:
            values = self._range_of_leaf(tensor)
        elif not any(r.nonfinite for _, r in memory.writes):
            return Input(memory.writes[-1][1], self.name_of(tensor), writer=writer), None
        else:
            values = range_of(tensor)
        found = Input(values, self.name_of(tensor), writer=writer)
        if not values.nonfinite:
            return found, None
        found.source = None if memory is None else _newest_nonfinite(memory)
        found.rows, found.length = nonfinite_rows(tensor)
        if found.source is None:
            entry = next((t for n, t in self._names.get(storage_key(tensor), []) if n == found.name), None)
            found.rows, found.length = (found.rows, found.length) if entry is None else rows_of(entry, tensor)
        return found, ~torch.isfinite(dense_values(tensor))

    def _range_of_leaf(self, tensor: Tensor) -> Range:
        values = strided_values(tensor)
        key = (storage_key(tensor), values.storage_offset(), values.shape, values.stride(), tensor._version)
        known = self._leaves.get(key)
        if known is None:
            known = self._leaves[key] = (range_of(tensor), tensor)  # kept, so that its memory is not used again
        return known[0]

    def _is_view(self, result: Tensor, written: list[Tensor], args: Any) -> bool:
        if any(result is tensor for tensor in written):
            return False
        key = storage_key(result)
        return any(storage_key(tensor) == key for tensor in _tensors(args))

    def _name(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            if not hasattr(tensor, "to_local"):
                self._names.setdefault(storage_key(tensor), []).append((name, tensor))


def _mark_what_reaches(result: Tensor, inputs: list[tuple[Tensor, Input, Tensor | None]], name: str) -> None:
    """An input reaches the result if both are non-finite at one place; if none does so, or that is unknown, all do."""
    bad = ~torch.isfinite(dense_values(result))
    nonfinite = [(entry, mask) for _, entry, mask in inputs if mask is not None]
    if name == "where":  # only what was chosen
        (chosen, *_), *branches = inputs
        sides = zip(branches, (chosen, ~chosen), strict=False)
        nonfinite = [(entry, mask & side) for (_, entry, mask), side in sides if mask is not None]
    for entry, mask in nonfinite:
        try:
            entry.reaches = bool((mask.expand_as(bad) & bad).any())
        except RuntimeError:  # another shape
            entry.reaches = True
    if not any(entry.reaches for entry, _ in nonfinite):
        for entry, _ in nonfinite:
            entry.reaches = True


def _newest_nonfinite(memory: _Memory) -> int | None:
    return next((index for index, values in reversed(memory.writes) if values.nonfinite), None)


def _arguments(schema: Any, short: str, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation reads, and those that it writes."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    for place, argument in enumerate(schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        tensors = list(_tensors((value,)))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes or place in _BATCH_NORMS.get(short, ()):
            written += tensors
        if not (writes and (short in _OVERWRITING or argument.is_out)):
            read += tensors
    return read, written


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if value is None or type(value) in _NUMBERS:  # asking `isinstance` of torch's class is slow
            continue
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _nonfinite_numbers(values: Any) -> Iterator[float]:
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _nonfinite_numbers(value)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
