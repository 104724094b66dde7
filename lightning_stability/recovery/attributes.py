"""Whatever a module holds, as it is now: to be put back after code has run that may write to any of it."""

from __future__ import annotations

import argparse
import array
import collections
import io
import random
import sys
import types
from collections import OrderedDict, deque
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

_DEPTH = 8  # how far from its module an object of the user's may be: four objects, one inside of the other
_LIBRARIES = ("torch", "pytorch_lightning", "lightning", "lightning_fabric", "numpy", "lightning_stability")
_HOLDERS = (
    argparse.Namespace,
    types.SimpleNamespace,
    collections.UserDict,
    collections.UserList,
    collections.ChainMap,
)
_ABSENT = object()


class CannotPutBack(Exception):
    """A module holds something whose state cannot be had, such as an iterator."""


class Attributes:
    """The state of a module and of all that it holds, copied when this is made and written back by `put_back`.

    That is parameters, buffers and other tensors (in the same memory; their shape, `requires_grad` and hooks too),
    hooks, metrics, plain attributes, and within these lists, dicts, sets, arrays, bytearrays, random generators and
    objects of the user's own classes, with `__slots__` or not. Of these classes and of the module's own, the attributes
    of the class are put back too, and what their methods hold from the functions around them (`nonlocal`).

    What is not put back: global variables, files, what stands behind an object of a library (a class that derives from
    one of torch's or Lightning's and is no `nn.Module` is a library's too), the elements of a list of more than 1,000,
    and tensors and arrays above 64 MiB that are neither parameter nor buffer.

    Args:
        module: Whose state is meant.
        others: Further objects whose attributes are meant, of whatever class.

    Raises:
        CannotPutBack: If the module holds an iterator, parameters that have no shape yet, or objects more than four
            deep in others.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> net.seen = [1]
        >>> before = Attributes(net)
        >>> _ = net(torch.randn(4, 2)), net.seen.append(2)
        >>> before.put_back()
        >>> net.seen, net.num_batches_tracked.item(), net.running_mean.tolist()
        ([1], 0, [0.0, 0.0])
    """

    def __init__(self, module: nn.Module, *others: Any) -> None:
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}  # also keeps them alive, so that no id is given twice
        self._visit(module, type(module).__name__, depth=0, registered=False)
        for other in others:
            self._keep_dict(vars(other), type(other).__name__, depth=0)

    @torch.no_grad()
    def put_back(self) -> None:
        """Write everything back that has become another since.

        Raises:
            Exception: The first that there was, after all that can be put back has been.
        """
        errors = []
        for undo in self._undo:
            try:
                undo()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _visit(self, value: Any, path: str, depth: int, registered: bool) -> None:
        if id(value) in self._seen or value is None or isinstance(value, (bool, int, float, str, bytes, type)):
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._keep_tensor(value, path, registered)
        elif isinstance(value, nn.Module):
            self._keep_dict(vars(value), path, depth=0)
            self._keep_class(type(value), path, depth=0)
        elif isinstance(value, dict):
            self._keep_dict(value, path, depth)
            self._keep_object(value, path, depth)
        elif isinstance(value, (list, deque, set)):
            self._keep_collection(value, path, depth)
            self._keep_object(value, path, depth)
        elif isinstance(value, (tuple, frozenset)):
            self._visit_elements(value, path, depth)
        elif isinstance(value, (bytearray, array.array)):
            self._undo.append(partial(_put_elements_back, value, value[:]))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and value.nbytes <= MOST_BYTES and not isinstance(value, np.memmap):
                self._undo.append(partial(_put_array_back, value, value.copy()))
        elif (generator_undo := _generator_undo(value)) is not None:
            self._undo.append(generator_undo)
        elif isinstance(value, (io.BytesIO, io.StringIO)):
            if not value.closed:
                self._undo.append(partial(_put_stream_back, value, value.getvalue(), value.tell()))
        elif isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            raise CannotPutBack(f"`{path}` is an iterator")
        elif isinstance(value, types.FunctionType):
            self._keep_function(value, path, depth)
        elif isinstance(value, types.MethodType):
            self._visit(value.__func__, path, depth, registered=False)
            self._visit(value.__self__, path, depth, registered=False)
        elif isinstance(value, partial):
            self._visit_elements((value.func, value.args, value.keywords), path, depth)
        else:
            self._keep_object(value, path, depth)

    def _keep_dict(self, mapping: dict[Any, Any], path: str, depth: int) -> None:
        kept = dict(_dict_type(mapping).items(mapping))
        self._undo.append(partial(put_dict_back, mapping, kept))
        if len(kept) > MOST_ELEMENTS and depth:
            return
        for key, value in kept.items():
            if key in ("_parameters", "_buffers", "_modules") and isinstance(value, dict):
                self._seen[id(value)] = value
                self._undo.append(partial(put_dict_back, value, dict(value)))
                for name, inner in value.items():
                    self._visit(inner, f"{path}.{name}", depth, registered=True)
            elif key not in ("_trainer", "_fabric", "trainer"):
                self._visit(value, f"{path}.{key}", depth + 1, registered=False)

    def _keep_collection(self, values: list[Any] | deque[Any] | set[Any], path: str, depth: int) -> None:
        kept = list(values)
        self._undo.append(partial(_put_collection_back, values, kept))
        self._visit_elements(kept, path, depth)

    def _visit_elements(self, values: Any, path: str, depth: int) -> None:
        if len(values) <= MOST_ELEMENTS:
            for index, value in enumerate(values):
                self._visit(value, f"{path}[{index}]", depth + 1, registered=False)

    def _keep_object(self, value: Any, path: str, depth: int) -> None:
        """What an object of the user's own holds, and its class."""
        if not _is_users_own(value):
            return
        if depth >= _DEPTH:
            raise CannotPutBack(f"`{path}` lies too deep in other objects")
        if hasattr(value, "__dict__"):
            self._keep_dict(vars(value), path, depth + 1)
        slots = {member: _slot(member, value) for member in _slots_of(type(value))}
        if slots:
            self._undo.append(partial(_put_slots_back, value, slots))
        for member, inner in slots.items():
            self._visit(inner, f"{path}.{member.__name__}", depth + 2, registered=False)
        self._keep_class(type(value), path, depth)

    def _keep_class(self, cls: type, path: str, depth: int) -> None:
        for kind in cls.__mro__:
            if id(kind) in self._seen or _is_library(kind.__module__):
                continue
            self._seen[id(kind)] = kind
            kept = _class_attributes(kind)
            self._undo.append(partial(_put_class_back, kind, kept))
            for name, value in kept.items():
                function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
                self._visit(function, f"{path}.{name}", depth + 1, registered=False)

    def _keep_function(self, function: types.FunctionType, path: str, depth: int) -> None:
        """A function's attributes and defaults, and the variables that it shares with the function it was made in."""
        if _is_library(function.__module__) or depth > _DEPTH:
            return
        self._keep_dict(vars(function), path, depth)
        self._visit(function.__defaults__, path, depth, registered=False)
        for cell in function.__closure__ or ():
            if id(cell) not in self._seen:
                self._seen[id(cell)] = cell
                content = _content(cell)
                self._undo.append(partial(_put_cell_back, cell, content))
                self._visit(content, path, depth + 1, registered=False)

    def _keep_tensor(self, tensor: Tensor, path: str, registered: bool) -> None:
        if is_lazy(tensor):
            raise CannotPutBack(f"`{path}` gets its shape in the first forward pass")
        self._keep_dict(vars(tensor), path, depth=_DEPTH)
        self._undo.append(_gradient_undo(tensor))
        if tensor.layout != torch.strided:
            return
        is_data = not registered and tensor.numel() * tensor.element_size() > MOST_BYTES
        shares_elements = any(not s and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
        data = tensor.data
        copy = None if is_data or shares_elements else data.clone()
        self._undo.append(partial(_put_tensor_back, tensor, data, copy, data.untyped_storage().nbytes()))


def _put_tensor_back(tensor: Tensor, data: Tensor, copy: Tensor | None, size: int) -> None:
    """Values, memory, shape and dtype; `data` shares the memory that the tensor had."""
    if data.untyped_storage().nbytes() < size:
        data.untyped_storage().resize_(size)
    if copy is not None:
        data.copy_(copy)
    if _place(tensor) != _place(data):
        tensor.data = data


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _gradient_undo(tensor: Tensor) -> Callable[[], None]:
    """What puts back a leaf's gradient, whether it gets one, and the hooks on it."""
    needed = tensor.requires_grad
    gradient = tensor.grad if tensor.is_leaf else None
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    hooks = {name: dict(getattr(tensor, name, None) or {}) for name in names}

    def undo() -> None:
        if not tensor.is_leaf:
            return
        tensor.grad = gradient
        if tensor.requires_grad != needed:
            tensor.requires_grad_(needed)
        for name, kept in hooks.items():
            now = getattr(tensor, name, None)
            if now is not None:
                put_dict_back(now, kept)

    return undo


def _dict_type(mapping: dict[Any, Any]) -> type[dict[Any, Any]]:
    """Whose methods are to be used, as the mapping's own class may do something else in them."""
    return OrderedDict if isinstance(mapping, OrderedDict) else dict


def put_dict_back(mapping: dict[Any, Any], kept: dict[Any, Any]) -> None:
    """Make a dict hold the same objects again, in the same order.

    Args:
        mapping: Of any class that derives from dict.
        kept: What it held.
    """
    kind = _dict_type(mapping)
    now = kind.items(mapping)
    if len(now) == len(kept) and all(a is b and x is y for (a, x), (b, y) in zip(now, kept.items(), strict=True)):
        return
    kind.clear(mapping)
    for key, value in kept.items():
        kind.__setitem__(mapping, key, value)


def _put_collection_back(values: list[Any] | deque[Any] | set[Any], kept: list[Any]) -> None:
    if len(values) == len(kept) and all(a is b for a, b in zip(values, kept, strict=True)):
        return
    values.clear()
    values.update(kept) if isinstance(values, set) else values.extend(kept)


def _put_elements_back(values: bytearray | array.array[Any], kept: Any) -> None:
    if values != kept:
        values[:] = kept


def _put_array_back(values: Any, kept: Any) -> None:
    if values.shape != kept.shape:
        values.resize(kept.shape, refcheck=False)
    np.copyto(values, kept)


def _put_stream_back(stream: Any, content: Any, position: int) -> None:
    stream.seek(0)
    stream.truncate()
    stream.write(content)
    stream.seek(position)


def _slots_of(cls: type) -> list[types.MemberDescriptorType]:
    kinds = [kind for kind in cls.__mro__ if "__slots__" in vars(kind)]
    return [m for kind in kinds for m in vars(kind).values() if isinstance(m, types.MemberDescriptorType)]


def _slot(member: types.MemberDescriptorType, value: Any) -> Any:
    try:
        return member.__get__(value)
    except AttributeError:
        return _ABSENT


def _put_slots_back(value: Any, kept: dict[types.MemberDescriptorType, Any]) -> None:
    for member, old in kept.items():
        if _slot(member, value) is not old:  # written past the class's own `__setattr__`, which may refuse
            member.__delete__(value) if old is _ABSENT else member.__set__(value, old)


def _class_attributes(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("__") and name != "_abc_impl"}


def _put_class_back(cls: type, kept: dict[str, Any]) -> None:
    now = _class_attributes(cls)
    for name in now.keys() - kept.keys():
        type.__delattr__(cls, name)
    for name, value in kept.items():
        if now.get(name, _ABSENT) is not value:
            type.__setattr__(cls, name, value)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def _put_cell_back(cell: types.CellType, old: Any) -> None:
    if _content(cell) is not old:
        if old is _ABSENT:
            del cell.cell_contents
        else:
            cell.cell_contents = old


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


def _is_library(module: str | None) -> bool:
    root = (module or "").partition(".")[0]
    return root in _LIBRARIES or root in sys.stdlib_module_names


def _is_users_own(value: Any) -> bool:
    """Whether an object is of a class that no library below us defines, and so may be a plain holder of numbers."""
    if type(value) in _HOLDERS:
        return True
    if type(value).__module__.partition(".")[0] in sys.stdlib_module_names:
        return False
    return not any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in type(value).__mro__)
