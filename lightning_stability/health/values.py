"""Which tensors of a module or a batch are not finite, by name; a look that waits for the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def nonfinite_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those tensors that hold NaN or infinity.

    Args:
        tensors: Names and tensors, as `named_parameters()` gives them. Only floating and complex ones are looked at.

    Example:
        >>> nonfinite_names([("a", torch.zeros(2)), ("b", torch.tensor([1.0, float("nan")]))])
        ['b']
    """
    looked_at = [(name, t) for name, t in tensors if t.is_floating_point() or t.is_complex()]
    flags = [torch.isfinite(getattr(t, "to_local", lambda t=t: t)().detach()).all() for _, t in looked_at]
    if not flags:
        return []
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return [name for (name, _), good in zip(looked_at, finite, strict=True) if not good]


def named_tensors(batch: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch, whatever their nesting, with a name that says where they are.

    Args:
        batch: Tensors in dicts, lists, tuples, dataclasses and named tuples.
        name: What the batch itself is called.

    Example:
        >>> [name for name, _ in named_tensors({"eeg": torch.zeros(1), "rest": [torch.zeros(1)]})]
        ["batch['eeg']", "batch['rest'][0]"]
    """
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from named_tensors(value, f"{name}[{key!r}]")
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        for key in batch._fields:
            yield from named_tensors(getattr(batch, key), f"{name}.{key}")
    elif isinstance(batch, (list, tuple)):
        for index, value in enumerate(batch):
            yield from named_tensors(value, f"{name}[{index}]")
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for item in dataclasses.fields(batch):
            yield from named_tensors(getattr(batch, item.name), f"{name}.{item.name}")
