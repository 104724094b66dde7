"""The tensors of a batch or a module by name, and which of them are not finite, and where."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_stability.health.late_reads import begin_read
from lightning_stability.internals import has_own_dispatch, leaves_with_paths, map_leaves

SMALL = 4096
"""Values up to which a tensor of labels is small."""


# Where the tensors are


def named_tensors(tree: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch, whatever their nesting, with a name that says where they are; no two names are equal.

    Tensors may lie in dicts, lists, tuples, dataclasses, named tuples, and in attributes of what has a method `to`,
    which Lightning moves to a device by that. Private attributes are looked into, but not named. An object that raises
    when it is looked at holds none.

    Example:
        >>> [name for name, _ in named_tensors({"eeg": torch.zeros(1), "rest": [torch.zeros(1)]})]
        ["batch['eeg']", "batch['rest'][0]"]
    """
    seen: dict[str, int] = defaultdict(int)
    for path, tensor in _walk(tree, name, ()):
        seen[path] += 1
        yield path if seen[path] == 1 else f"{path} ({seen[path]})", tensor


def tensors_of(tree: Any) -> list[Tensor]:
    """The same tensors without their names, which take most of the time."""
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Tensor]) -> None:
    kind = type(tree)
    if kind is Tensor:
        found.append(tree)
    elif kind is dict or kind is OrderedDict:  # (Lightning's arguments are one)
        for value in tree.values():
            _collect(value, found)
    elif kind is list or kind is tuple:
        for value in tree:
            _collect(value, found)
    elif kind not in _HOLD_NONE:
        found.extend(tensor for _, tensor in named_tensors(tree))


_HOLD_NONE = (int, float, str, bytes, bool, type(None))


def _walk(tree: Any, name: str, within: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in leaves_with_paths(tree):
        if issubclass(type(leaf), Tensor):
            yield name + path, leaf
        elif not any(leaf is outer for outer in within):  # nor to its parent and back
            for key, value in _members(leaf):
                yield from _walk(value, name + path + key, (*within, leaf))


def _members(value: Any) -> list[tuple[str, Any]]:
    try:
        if isinstance(value, Mapping):
            return [(f"[{key!r}]", item) for key, item in value.items()]
        if isinstance(value, (list, tuple)):
            return [(f"[{index}]", item) for index, item in enumerate(value)]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return [(f".{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value)]
        if callable(getattr(type(value), "to", None)) and not isinstance(value, (nn.Module, type)):
            return [(_shown(key, item), item) for key, item in vars(value).items()]
    except Exception:  # whatever a class of the user's raises
        pass
    return []


def _shown(attribute: str, value: Any) -> str:
    is_hidden = attribute.startswith("_") and not isinstance(value, Tensor)
    return "" if is_hidden else f".{attribute}"


def small_members(batch: Any) -> Any:
    """A batch without its large tensors, which would otherwise stay in memory: labels, ids and names are kept.

    None stands for every tensor that is too long, or that is neither one-dimensional or less nor integer. What is kept
    is not copied.

    Example:
        >>> small_members({"eeg": torch.zeros(2, 19, 2048), "label": torch.tensor([0, 1]), "name": ["a", "b"]})
        {'eeg': None, 'label': tensor([0, 1]), 'name': ['a', 'b']}
    """
    return map_leaves(_small, batch)


def _small(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        ndim, size = value.ndim, value.numel() if isinstance(value, Tensor) else value.size
        integer = not value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind in "iub"
        return value if size <= SMALL and (ndim <= 1 or integer) else None
    if isinstance(value, Mapping):
        return {key: small_members(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(kept, field.name, small_members(getattr(value, field.name)))
        return kept
    return value if isinstance(value, (str, bytes, int, float, bool, type(None))) else None


# What is not finite


class NonfiniteLook:
    """Which tensors hold NaN or infinity: the devices look while the host goes on.

    All tensors of one device and dtype are read in one multi-tensor pass.

    Args:
        tensors: With their names. Those that cannot hold either are passed over.

    Example:
        >>> look = NonfiniteLook([("a", torch.zeros(2)), ("b", torch.tensor([1.0, float("nan")]))])
        >>> look.count(torch.device("cpu")), look.names()
        (tensor(1), ['b'])
    """

    @torch.no_grad()
    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._names: list[str] = []
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, tensor in tensors:
            values = stored_floats(tensor)
            if values is not None:
                places, held = groups[values.device, values.dtype]
                places.append(len(self._names))
                held.append(values)
                self._names.append(name)
        flags: dict[torch.device, list[Tensor]] = defaultdict(list)
        order: dict[torch.device, list[int]] = defaultdict(list)
        for (device, _), (places, held) in groups.items():
            # the largest magnitude of each: it is NaN or inf if any number is, and no square overflows on the way
            norms = torch._foreach_norm(held, float("inf"))  # type: ignore[no-untyped-call]
            flags[device].append(~torch.isfinite(torch.stack(norms)))
            order[device] += places
        self._flags = [torch.cat(of_device) for of_device in flags.values()]
        self._arriving = list(zip(order.values(), map(begin_read, self._flags), strict=True))

    def count(self, device: torch.device) -> Tensor:
        """How many hold one, as a tensor on a device, without waiting for it."""
        counts = [flags.sum().to(device, non_blocking=True) for flags in self._flags]
        return torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64, device=device)

    def names(self) -> list[str]:
        """Their names, in the order of the tensors; waits for the devices."""
        found = [
            place
            for places, arrived in self._arriving
            for place, is_one in zip(places, arrived(), strict=True)
            if is_one
        ]
        return [self._names[place] for place in sorted(found)]


def nonfinite_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those tensors that hold NaN or infinity, in their order; the host waits once per device.

    Example:
        >>> nonfinite_names([("a", torch.zeros(2)), ("b", torch.tensor([1.0, float("nan")])), ("c", torch.tensor(1))])
        ['b']
    """
    return NonfiniteLook(tensors).names()


@torch.no_grad()
def nonfinite_rows(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Where a tensor is not finite: positions in its dimension 0 and in its dimension 1; waits for the device.

    In a batch those are samples and columns or channels. Of a nested tensor only the samples are known.

    Example:
        >>> nonfinite_rows(torch.tensor([[1.0, 2.0, 3.0], [4.0, float("nan"), float("inf")]]))
        ([1], [1, 2])
    """
    if stored_floats(tensor) is None or tensor.dim() == 0:
        return [], []
    if tensor.is_nested:
        return [row for row, part in enumerate(tensor.unbind()) if not bool(part.isfinite().all())], []
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.layout != torch.strided:
        sparse = tensor.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
        values = sparse.values()
        indices = sparse.indices()[:, ~values.isfinite().reshape(len(values), -1).all(dim=1)]
    else:
        indices = (~stored_floats(tensor).isfinite()).nonzero().t()  # type: ignore[union-attr]
    rows, columns = ([int(place) for place in line.unique()] for line in (indices[0], indices[1:2]))
    return rows, columns


def stored_floats(tensor: Tensor) -> Tensor | None:
    """The numbers that a tensor of whatever kind stores; None if none of them can be non-finite, or none is there."""
    try:
        if is_lazy(tensor) or tensor.device.type == "meta":
            return None
        if hasattr(tensor, "to_local"):  # a DTensor: this rank's part
            tensor = tensor.to_local()
        tensor = tensor.detach()
        if tensor.is_nested:
            tensor = torch.cat([part.reshape(-1) for part in tensor.unbind()])
        elif tensor.layout != torch.strided:
            tensor = tensor.to_sparse_coo().coalesce().values()  # type: ignore[no-untyped-call]
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if has_own_dispatch(tensor) or not tensor.is_floating_point() or tensor.numel() == 0:
            return None
        return tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 has no norm
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError):  # a kind that nobody foresaw
        return None
