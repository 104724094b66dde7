"""Copies of many small tensors that are made, compared and restored by a few launches, none of them per tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_stability.internals import copy_each
from lightning_stability.recovery.tensors import CHECKED

CUDA_GRAPHS = False
"""Whether a CUDA device replays each pass as one graph; `benchmarks/buffers.py` measures both ways."""

_EAGER_PASSES = 3
"""Passes before a graph is captured: copies that are laid out anew for every batch are not worth one."""

Found = tuple[Tensor, Tensor]
"""A flag and an index, 0-dimensional."""


class FlatCopies:
    """Two flat copies of contiguous tensors of one device and word: from before a forward pass and from after it.

    On a device a good pass over the 159 buffers of 53 batch norms is 12 launches: 2 to remember, 2 to gather what the
    pass has left, 5 to compare, 3 to restore.

    Args:
        tensors: As the module holds them.
        memory: The same, as `tensors.dense` gives them.
    """

    def __init__(self, tensors: list[Tensor], memory: list[Tensor], names: list[str]) -> None:
        # Wide numbers come first, so that all are aligned; among those of a dtype the small tensors come first, so that
        # indices into them are small enough for float32.
        order = sorted(
            range(len(memory)), key=lambda i: (-memory[i].element_size(), str(memory[i].dtype), memory[i].numel())
        )
        self.tensors = [tensors[i] for i in order]
        memory = [memory[i] for i in order]
        device, word = memory[0].device, word_of(memory[0])
        self._addresses = self._current_addresses()
        self._words = [tensor.view(-1).view(word) for tensor in memory]
        sizes = [words.numel() for words in self._words]
        self._old, self._new = (torch.zeros(sum(sizes), dtype=word, device=device) for _ in range(2))
        self._old_words, self._new_words = list(torch.split(self._old, sizes)), list(torch.split(self._new, sizes))
        self.old = [
            words.view(tensor.dtype).view(tensor.shape) for words, tensor in zip(self._old_words, memory, strict=True)
        ]
        self._spans = _spans(memory, [names[i] for i in order], self._old, self._new)
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._verdict = self._bad
        self._on_host = device.type == "cpu"
        self._nothing = torch.zeros((), dtype=torch.bool), torch.zeros((), dtype=torch.int64)
        self._found: Found | None = None
        self._remember = _Launches(lambda: torch.cat(self._words, out=self._old), device)
        self._compare = _Launches(self._gather_and_compare, device)
        self._choose = _Launches(self._restore_where_bad, device)

    @property
    def checked(self) -> int:
        """How many numbers are compared."""
        return sum(span.old.numel() for span in self._spans)

    def name_at(self, index: int) -> str:
        """The tensor that an index of `nonfinite` points into."""
        span = next(span for span in reversed(self._spans) if span.start <= index)
        return span.name_at(index - span.start)

    def is_in_place(self) -> bool:
        """Whether the tensors are still in that memory: `Module.to` and `tensor.data = ...` move them."""
        return self._current_addresses() == self._addresses

    def _current_addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.tensors))

    def remember(self) -> None:
        """Copy the tensors as they are before a forward pass."""
        self._remember()

    def nonfinite(self) -> Found | None:
        """Gather the tensors as they are after it; whether a number has become NaN or +inf, and which."""
        self._compare()
        if self._found is None or not self._compare.replays:
            return self._found
        return self._found[0].clone(), self._found[1].clone()  # the next replay writes into them

    def restore_where(self, bad: Tensor) -> None:
        """Restore what was remembered if the flag says so, else what `nonfinite` has gathered, without a host read."""
        if CUDA_GRAPHS:  # (a graph reads the memory that it was captured with)
            bad = self._bad.copy_(bad)
        self._verdict = bad.to(self._bad.device)
        self._choose()

    def restore(self) -> None:
        """Restore what was remembered."""
        copy_each(self._words, self._old_words)

    def _gather_and_compare(self) -> None:
        torch.cat(self._words, out=self._new)
        self._found = None
        if self._on_host and all(span.is_finite() for span in self._spans):
            self._found = self._nothing if self._spans else None
            return
        for span in self._spans:
            self._found = either(self._found, span.nonfinite())

    def _restore_where_bad(self) -> None:
        torch.where(self._verdict, self._old, self._new, out=self._new)
        copy_each(self._words, self._new_words)


def word_of(tensor: Tensor) -> torch.dtype:
    """The integer type that a tensor's memory is copied as, so that numbers of several types go together."""
    return {1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32)


@dataclass(slots=True)
class _Span:
    """The numbers of one type in both copies."""

    start: int
    old: Tensor
    new: Tensor
    names: list[str]
    ends: list[int]
    zero: Tensor

    def is_finite(self) -> bool:
        """Whether nothing is NaN or +inf now; on the host, where it can be read at once."""
        return not self.new.is_complex() and bool(self.new.max() < torch.inf)

    def nonfinite(self) -> Found:
        old, new = (values.abs() if values.is_complex() else values for values in (self.old, self.new))
        # The largest is NaN if one of them is, with its index. What was NaN or +inf before is left out.
        largest, index = torch.where(old < torch.inf, new, self.zero).max(0)
        return (largest < torch.inf).logical_not_(), index + self.start if self.start else index

    def name_at(self, index: int) -> str:
        return next(name for name, end in zip(self.names, self.ends, strict=True) if index < end)


def _spans(memory: list[Tensor], names: list[str], old: Tensor, new: Tensor) -> list[_Span]:
    spans, place, start = [], 0, 0
    for dtype, group in itertools.groupby(zip(memory, names, strict=True), key=lambda pair: pair[0].dtype):
        pairs = list(group)
        ends = list(itertools.accumulate(tensor.numel() for tensor, _ in pairs))
        words = ends[-1] * pairs[0][0].element_size() // old.element_size()
        if dtype in CHECKED:
            names_here = [name for _, name in pairs]
            of_old, of_new = (flat[place : place + words].view(dtype) for flat in (old, new))
            spans.append(_Span(start, of_old, of_new, names_here, ends, _zero_of(of_old)))
            start += ends[-1]
        place += words
    return spans


def _zero_of(values: Tensor) -> Tensor:
    return torch.zeros((), dtype=values.dtype.to_real(), device=values.device)


class _Launches:
    """The same launches on the same memory each time it is called; on a CUDA device they may become one graph."""

    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self._run = run
        self._device = device
        self._passes = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not CUDA_GRAPHS or self._device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            self._run()
        elif self._passes < _EAGER_PASSES:
            self._passes += 1
            self._run()
        else:
            if self._graph is None:
                self._graph = self._captured()
            self._graph.replay()

    @property
    def replays(self) -> bool:
        return self._graph is not None

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        current, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        with torch.cuda.device(self._device), torch.cuda.stream(aside):
            graph.capture_begin(capture_error_mode="thread_local")  # type: ignore[no-untyped-call]
            self._run()
            graph.capture_end()  # type: ignore[no-untyped-call]
        current.wait_stream(aside)
        return graph


def either(a: Found | None, b: Found) -> Found:
    """A flag that is set where one of two is, and the index of the first that is.

    Args:
        a: A flag and its index, or None for nothing.
        b: The same; may be on another device.
    """
    if a is None:
        return b
    flag, index = (tensor.to(a[0].device) for tensor in b)
    return a[0] | flag, torch.where(a[0], a[1], index)
