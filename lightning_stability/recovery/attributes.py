"""Whatever a module holds, as it is now: to be put back after code has run that may write to any of it."""

from __future__ import annotations

import argparse
import io
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

MOST_ELEMENTS = 1_000
"""Of a longer list only the list itself is put back, not what its elements hold."""

MOST_BYTES = 64 * 2**20
"""A larger array that is neither parameter nor buffer is taken for data, which nobody writes to."""

_DEPTH = 4  # how far from its module an object of the user's may be
_LIBRARIES = ("torch", "pytorch_lightning", "lightning", "lightning_fabric", "numpy", "lightning_stability")


class CannotPutBack(Exception):
    """A module holds something whose state cannot be had, such as an iterator."""


class Attributes:
    """The state of a module and of all that it holds, copied when this is made and written back by `put_back`.

    That is parameters, buffers and other tensors (in the same memory), metrics, plain attributes, and within these
    lists, dicts, sets, arrays, random generators and objects of the user's own classes. What is not put back: global
    variables, files, and what stands behind an object of a library.

    Args:
        module: Whose state is meant.

    Raises:
        CannotPutBack: If the module holds an iterator, or parameters that have no shape yet.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> net.seen = [1]
        >>> before = Attributes(net)
        >>> _ = net(torch.randn(4, 2)), net.seen.append(2)
        >>> before.put_back()
        >>> net.seen, net.num_batches_tracked.item(), net.running_mean.tolist()
        ([1], 0, [0.0, 0.0])
    """

    def __init__(self, module: nn.Module) -> None:
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}  # also keeps them alive, so that no id is given twice
        self._visit(module, type(module).__name__, depth=0, registered=False)

    @torch.no_grad()
    def put_back(self) -> None:
        """Write everything back that has become another since."""
        for undo in self._undo:
            undo()

    def _visit(self, value: Any, path: str, depth: int, registered: bool) -> None:
        if id(value) in self._seen or value is None or isinstance(value, (bool, int, float, str, bytes, type)):
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._keep_tensor(value, path, registered)
        elif isinstance(value, nn.Module):
            self._keep_dict(vars(value), path, depth=0)
        elif isinstance(value, dict):
            self._keep_dict(value, path, depth)
        elif isinstance(value, (list, deque, set)):
            self._keep_collection(value, path, depth)
        elif isinstance(value, tuple):
            self._visit_elements(value, path, depth)
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and value.nbytes <= MOST_BYTES and not isinstance(value, np.memmap):
                self._undo.append(_array_undo(value))
        elif (generator_undo := _generator_undo(value)) is not None:
            self._undo.append(generator_undo)
        elif isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            raise CannotPutBack(f"`{path}` is an iterator")
        elif _is_users_own(value) and depth < _DEPTH:
            self._keep_dict(vars(value), path, depth + 1)

    def _keep_dict(self, mapping: dict[Any, Any], path: str, depth: int) -> None:
        kept = dict(mapping)
        self._undo.append(lambda: _put_dict_back(mapping, kept))
        if len(kept) > MOST_ELEMENTS and depth:
            return
        for key, value in kept.items():
            if key in ("_parameters", "_buffers", "_modules") and isinstance(value, dict):
                self._seen[id(value)] = value
                self._undo.append(lambda old=value, now=dict(value): _put_dict_back(old, now))  # type: ignore[misc]
                for name, inner in value.items():
                    self._visit(inner, f"{path}.{name}", depth, registered=True)
            elif key not in ("_trainer", "_fabric", "trainer"):
                self._visit(value, f"{path}.{key}", depth + 1, registered=False)

    def _keep_collection(self, values: list[Any] | deque[Any] | set[Any], path: str, depth: int) -> None:
        kept = list(values)
        self._undo.append(lambda: _put_collection_back(values, kept))
        self._visit_elements(kept, path, depth)

    def _visit_elements(self, values: Any, path: str, depth: int) -> None:
        if len(values) <= MOST_ELEMENTS and depth <= _DEPTH:
            for index, value in enumerate(values):
                self._visit(value, f"{path}[{index}]", depth + 1, registered=False)

    def _keep_tensor(self, tensor: Tensor, path: str, registered: bool) -> None:
        if is_lazy(tensor):
            raise CannotPutBack(f"`{path}` gets its shape in the first forward pass")
        if isinstance(tensor, nn.Parameter):
            gradient = tensor.grad
            self._undo.append(lambda: setattr(tensor, "grad", gradient))
        if not registered and tensor.numel() * tensor.element_size() > MOST_BYTES:
            return
        data, shares_elements = tensor.data, False
        if tensor.layout == torch.strided:
            shares_elements = any(not s and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
        copy = None if tensor.layout != torch.strided or shares_elements else data.clone()

        def undo() -> None:
            if copy is not None:
                data.copy_(copy)
            if tensor.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype:
                tensor.data = data

        self._undo.append(undo)


def _put_dict_back(mapping: dict[Any, Any], kept: dict[Any, Any]) -> None:
    if len(mapping) == len(kept) and all(a is b and mapping[a] is kept[b] for a, b in zip(mapping, kept, strict=True)):
        return
    mapping.clear()
    mapping.update(kept)


def _put_collection_back(values: list[Any] | deque[Any] | set[Any], kept: list[Any]) -> None:
    if len(values) == len(kept) and all(a is b for a, b in zip(values, kept, strict=True)):
        return
    values.clear()
    values.update(kept) if isinstance(values, set) else values.extend(kept)


def _array_undo(array: Any) -> Callable[[], None]:
    copy = array.copy()
    return lambda: np.copyto(array, copy)


def _generator_undo(value: Any) -> Callable[[], None] | None:
    """What puts a random generator back; None if it is none."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())  # type: ignore[return-value]
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _is_users_own(value: Any) -> bool:
    """Whether an object is of a class that no library below us defines, and so may be a plain holder of numbers."""
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        return True
    if not hasattr(value, "__dict__") or callable(value):
        return False
    if type(value).__module__.partition(".")[0] in sys.stdlib_module_names:
        return False
    return not any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in type(value).__mro__)
