"""Batches and state as plain tensors, numbers, dicts and lists, so that a file of them loads with `weights_only=True`.

Named tuples, dataclasses and numpy arrays are written down as dicts that say what they are. Reading one
imports its class only if that is a named tuple or a dataclass, and fills in its fields without calling it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_KIND = "__kind__"
_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.Size)


class NotPlainError(Exception):
    """A value cannot be written without pickling code; the message names it."""


def to_plain(value: Any, name: str = "batch") -> Any:
    """A value in a form that loads without executing code.

    Args:
        value: Nested tensors, arrays and numbers.
        name: What it is called in the error.

    Raises:
        NotPlainError: If it holds something else.

    Example:
        >>> from_plain(to_plain({"x": (1, np.zeros(2))}))
        {'x': (1, array([0., 0.]))}
    """
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in "biufc":
            raise NotPlainError(f"{name} is an array of {value.dtype}")
        return {_KIND: "array" if isinstance(value, np.ndarray) else "scalar", "value": torch.tensor(value)}
    if isinstance(value, Mapping):
        items = {_key(key, name): to_plain(item, f"{name}[{key!r}]") for key, item in value.items()}
        return items
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = {key: to_plain(getattr(value, key), f"{name}.{key}") for key in value._fields}
        return {_KIND: "named tuple", "class": _path_of(type(value), name), "value": fields}
    if isinstance(value, (list, tuple)):
        values = [to_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
        return values if isinstance(value, list) else tuple(values)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: to_plain(getattr(value, f.name), f"{name}.{f.name}")
            for f in dataclasses.fields(value)
            if hasattr(value, f.name)
        }
        return {_KIND: "dataclass", "class": _path_of(type(value), name), "value": fields}
    raise NotPlainError(f"{name} is a {type(value).__module__}.{type(value).__qualname__}")


def from_plain(value: Any) -> Any:
    """The value that `to_plain` was given; a mapping is a dict.

    Raises:
        ValueError: If a class is not there any more, or is neither a named tuple nor a dataclass.
    """
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(from_plain(item) for item in value)
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: from_plain(item) for key, item in value.items()}
    if kind == "array":
        return value["value"].numpy()
    if kind == "scalar":
        return value["value"].numpy()[()]
    cls, fields = _load_class(value["class"]), from_plain(value["value"])
    if kind == "named tuple" and issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return tuple.__new__(cls, [fields[name] for name in cls._fields])
    if kind == "dataclass" and dataclasses.is_dataclass(cls):
        made = object.__new__(cls)
        for name, item in fields.items():
            object.__setattr__(made, name, item)
        return made
    raise ValueError(f"{value['class']} is not a {kind}")


def _key(key: Any, name: str) -> Any:
    if type(key) not in (str, int, float, bool) or key == _KIND:
        raise NotPlainError(f"a key of {name} is {key!r}")
    return key


def _path_of(cls: type, name: str) -> str:
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        raise NotPlainError(f"{name} is a {cls.__qualname__} of {cls.__module__}, which no other process can import")
    return f"{cls.__module__}:{cls.__qualname__}"


def _load_class(path: str) -> type:
    module, _, name = path.partition(":")
    try:
        cls: Any = importlib.import_module(module)
        for part in name.split("."):
            cls = getattr(cls, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the batch needs the class {path}, which cannot be imported here: {error}") from error
    if not isinstance(cls, type):
        raise ValueError(f"{path} is no class")
    return cls
